"""A comparison's record as Markdown: one table of training steps, one of reverse steps."""


def markdown(record):
    lines = [head(record), ""]
    if record.get("toy"):
        lines += ["A toy run: every part of the program ran on the emulator and the processor; nothing was measured or compared.", ""]
    clock = "milliseconds, median over undisturbed blocks (fastest in brackets)"
    if record["clock"] == "processor":
        clock = "milliseconds of one thread's processor time (the machine was shared), median over blocks (fastest in brackets)"
    for kind, title in (("train", "Training step"), ("sample", "One reverse step")):
        rows = [r for r in record["rows"] if r["kind"] == kind]
        if rows:
            lines += [f"**{title}**, {clock}", "", *table(kind, rows), ""]
            lines += [f"{label(r)}, {name}: {note}" for r in rows for name, note in r["notes"].items()]
            lines += [sweep(r) for r in rows if "p3" in r]
            lines += [""] if lines[-1] else []
    lines += checks(record)
    return "\n".join(lines).rstrip() + "\n"


def head(record):
    m, threads, gpu = record["machine"], record["threads"], record.get("gpu")
    device = f"{m['cpu']} ({threads} thread{'s' if threads != 1 else ''} of {m['cores']} cores, {m['system']})"
    if gpu:
        device = f"{gpu['name']} (driver {gpu['driver_version']}, compute capability {gpu['compute_cap']}), {m['cpu']}"
        if r := record.get("gpu_range"):
            device += f"; clock {r['sm_mhz'][0]:.0f} to {r['sm_mhz'][1]:.0f} MHz, up to {r['power_w'][1]:.0f} W"
    return f"{record['date']}, commit {record['commit']}, {device}, {record['peer']}."


def label(r):
    return f"{r['config']} at {r['batch']}"


def table(kind, rows):
    names = list(dict.fromkeys(n for r in rows for n in [*r["sides"], *r["notes"]] if n != "iddpm"))
    columns = ["config", "batch"] + (["sampler"] if kind == "sample" else []) + ["precision", "iddpm ms", *(f"{n} ms" for n in names)]
    columns += ["ratio to the fastest", "range over pairs", "pairs", "floor ms", "memory MB, iddpm", "fastest peer"]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for r in rows:
        sides = r["sides"]
        cells = [r["config"], str(r["batch"])] + ([r["sampler"]] if kind == "sample" else []) + [precision(r)]
        cells += [milliseconds(sides.get(n)) for n in ["iddpm", *names]]
        if "ratio" in r:
            cells += [f"**{r['ratio']:.2f}**", f"{r['ratio_low']:.2f} to {r['ratio_high']:.2f}", str(r["pairs"])]
        else:
            cells += ["none", r["no_ratio"], "-"]
        mine, best = sides.get("iddpm", {}), sides.get(r.get("best_peer"), {})
        cells += [number(mine.get("floor_ms")), megabytes(mine.get("used_bytes")), megabytes(best.get("used_bytes"))]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def precision(r):
    """One word if all computed in the same, else ours and those of the variants that differ."""
    p = r.get("precisions", {})
    others = {n.split()[0]: v for n, v in p.items() if n != "iddpm" and v != p.get("iddpm")}
    return ", ".join([p.get("iddpm", "-"), *(f"{n} {v}" for n, v in others.items())])


def sweep(r):
    p = r["p3"]
    options = ", ".join(f"{k} {v}" for k, v in p["options"].items()) or "none but its own defaults"
    return f"{label(r)}: P3 is {p['variant'].removeprefix('P3 ')!r}, best of {p['tried']} of {p['of']} tried; options: {options}."


def checks(record):
    lines, c = [], record.get("curves")
    if record.get("golden"):
        lines.append(f"Peer against the golden vectors: {'passed' if record['golden']['passed'] else 'FAILED'}.")
    if c and "middle" in c:
        lines.append(f"Loss of {c['steps']} steps of {c['config']} on the same images ({c['precision']}), means of ten: peer's over ours "
                     f"{c['middle']:.3f} in the middle, quartiles {c['quartiles'][0]:.3f} and {c['quartiles'][1]:.3f}; from "
                     f"{c['losses']['ours'][0]:.3f} and {c['losses']['peer'][0]:.3f} to {c['losses']['ours'][-1]:.3f} and "
                     f"{c['losses']['peer'][-1]:.3f}: {'they agree' if c['agree'] else 'they DISAGREE'}.")
    elif c:
        lines.append(f"Losses were not compared: {c['why']}.")
    return lines


def number(x):
    return "-" if x is None else f"{x:.3g}"


def megabytes(x):
    return "-" if x is None else f"{x / 1e6:.0f}"


def milliseconds(side):
    if side is None or side["ms"] is None:
        return "-"
    return f"{side['ms']:.3g} ({side['min_ms']:.3g}){' busy' if side['busy'] else ''}"
