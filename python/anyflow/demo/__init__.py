"""The main job on real input: a teacher of handwritten digits, distilled into an any-step student in minutes."""
