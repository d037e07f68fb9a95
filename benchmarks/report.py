"""results.json, summary.md and bench.png of a run."""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import anyflow_kernels

if TYPE_CHECKING:
    from .conftest import Session

PACKAGES = ("torch", "triton", "diffusers", "peft", "numpy", "pytest-benchmark")
COLOURS = {"torch.compile": "#9a9a9a", "reference": "#7fb3d5", "native": "#1f618d", "triton": "#28a16f"}
OTHER_COLOURS = {"eager": "#c9c9c9", "AnyFlow": "#1f618d"}
MEASURED = "ratios, times, memory, copy bandwidth and matrix rate"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "cuda": torch.version.cuda or "none"}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def write(session: Session, output_json: dict[str, Any]) -> None:
    commit = output_json["commit_info"]
    gpu = session.device == "cuda"
    reported = [entry["extra_info"] for entry in output_json["benchmarks"]]
    results = [record for record in reported if "variants" in record]
    modelled = "gb_per_s and share_of_copy_bandwidth count the floor's bytes; flops and bytes_over_floor are counted"
    document = {
        "commit": commit.get("id"),
        "dirty": commit.get("dirty"),
        "time": output_json["datetime"],
        "device": torch.cuda.get_device_name() if gpu else output_json["machine_info"]["cpu"].get("brand_raw", "cpu"),
        "device_type": session.device,
        "threads": None if gpu else torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "keeps_pages": session.keeps_pages,
        "load_average": os.getloadavg(),
        "versions": versions(),
        "backends": anyflow_kernels.describe().splitlines(),
        "measured": MEASURED + (", launches" if gpu else ""),
        "modelled": modelled
        + (" by operator" if gpu else ", and so are launches: what PyTorch or Inductor would launch"),
        **session.roofs,
        "results": results,
        "overhead": [record for record in reported if record.get("kind") == "overhead"],
        "refused": session.refused,
    }
    (session.out / "results.json").write_text(json.dumps(document, indent=1) + "\n")
    (session.out / "summary.md").write_text(summary(document))
    plot(document, session.out / "bench.png")


def summary(document: dict[str, Any]) -> str:
    """Ratios first."""
    busy = document["device_type"] == "cpu" and document["load_average"][1] > (os.cpu_count() or 1)
    lines = [
        f"{document['device']} ({document['device_type']}), commit {document['commit']}"
        f"{' with changes' if document['dirty'] else ''}, load {document['load_average'][0]:.1f}. Copy bandwidth "
        f"{document['copy_gb_per_s']:.1f} GB/s. x: how many times as fast, median of interleaved rounds [quartiles].",
        *(["Freed memory was kept: no array lies in new pages."] if document["keeps_pages"] else []),
        *(["Other work was running on this machine: these times show that the suite works, no more."] if busy else []),
        "Measured: " + document["measured"] + ". Modelled: " + document["modelled"] + ".",
        "",
        "| what | variant | x eager | x compile | x copy of the floor | ms | of copy bandwidth | bytes / floor | "
        "peak MB | launches |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in document["results"]:
        what = f"{result.get('operator', 'distillation step')}, {result['model']}, {result['mode']}"
        for name, found in result["variants"].items():
            lines.append(f"| {what} | {name} | " + " | ".join(_cells(found)) + " |")
    if document["overhead"]:
        names = document["overhead"][0]["us"]
        lines += ["", "Microseconds of a call that has next to nothing to compute, medians of interleaved rounds.", ""]
        lines += [f"| what | backend | {' | '.join(names)} |", "|---|---|" + "---|" * len(names)]
    for record in document["overhead"]:
        medians = " | ".join(f"{found['median']:.2f}" for found in record["us"].values())
        lines.append(f"| {record['operator']}, {record['mode']} | {record['backend']} | {medians} |")
    lines += [f"REFUSED {entry['what']}, {entry['mode']}: {entry['why']}" for entry in document["refused"]]
    return "\n".join(lines) + "\n"


def _cells(found: dict[str, Any]) -> list[str]:
    def ratio(value: dict[str, float] | None) -> str:
        return "" if value is None else f"{value['median']:.2f} [{value['q1']:.2f}, {value['q3']:.2f}]"

    ratios = [ratio(found["ratio_to_eager"]), ratio(found["ratio_to_compile"])]
    memory = f"{found['peak_bytes'] / 1e6:.2f}"
    if "launches" not in found:
        return [*ratios, "", f"{found['ms']['median']:.1f}", "", "", memory, ""]
    share, moved = f"{100 * found['share_of_copy_bandwidth']:.0f} %", f"{found['bytes_over_floor']:.2f}"
    ratios.append(ratio(found["ratio_to_copy"]))
    return [*ratios, f"{found['ms']['median']:.3f}", share, moved, memory, str(found["launches"])]


def plot(document: dict[str, Any], path: Path) -> None:
    """Bars of the ratio to eager, with quartiles, and a roofline. Nothing where matplotlib is absent."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        print("matplotlib is absent: no bench.png")
        return
    results = [result for result in document["results"] if result["mode"] in ("both", "step")]
    if not results:
        return
    names = list(dict.fromkeys(name for result in document["results"] for name in result["variants"]))
    colours = {**COLOURS, **OTHER_COLOURS}
    figure, (bars, roof) = pyplot.subplots(1, 2, figsize=(18, 6 + 0.25 * len(results)), layout="constrained")
    drawn = [name for name in names if name != "eager"]
    height, labelled = 0.8 / len(drawn), set()
    for row, result in enumerate(results):
        for index, name in enumerate(drawn):
            if name not in result["variants"]:
                continue
            ratio = result["variants"][name]["ratio_to_eager"]
            error = [[ratio["median"] - ratio["q1"]], [ratio["q3"] - ratio["median"]]]
            label = None if name in labelled else name
            labelled.add(name)
            bars.barh(row + (index - (len(drawn) - 1) / 2) * height, ratio["median"], height, xerr=error,
                      color=colours.get(name), label=label, error_kw={"lw": 0.8})  # fmt: skip
    bars.axvline(1.0, color="black", lw=0.8)
    bars.set_yticks(range(len(results)), [f"{r.get('operator', 'step')}, {r['model']}" for r in results])
    bars.set_ylim(len(results) - 0.4, -0.6)
    bars.set_xscale("log")
    bars.set_xlabel("times as fast as eager PyTorch, forward and backward (whole step below)")
    bars.legend(fontsize=8)

    copy, peak = document["copy_gb_per_s"], document["product_gflop_per_s"]
    for name in names:
        points = [
            (result["flops"] / result["floor_bytes"], result["variants"][name]["gflop_per_s"])
            for result in results
            if result["kind"] == "operator" and name in result["variants"]
        ]
        if points:
            roof.scatter(*zip(*points, strict=True), s=18, color=colours.get(name), label=name)
    intensities = [10 ** (exponent / 20) for exponent in range(-40, 61)]
    roof.plot(intensities, [min(copy * x, peak) for x in intensities], color="black", lw=1)
    roof.set(xscale="log", yscale="log", ylabel="GFLOP/s (operations modelled)")
    roof.set_xlabel("operations a byte of the floor (modelled)")
    roof.set_title(f"roofs measured: copy {copy:.0f} GB/s,\nmatrix product {peak:.0f} GFLOP/s", fontsize=9)
    roof.set_box_aspect(1)
    roof.set_anchor("N")
    roof.legend(fontsize=8)
    figure.suptitle(f"{document['device']}, {document['versions']['torch']}, commit {str(document['commit'])[:8]}")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
