"""The tiers of the peer and the sweep that finds the fastest, as options of worker.py."""

EAGER = dict(precision="fp32", mode=None, graph=False)
COMPILED = dict(precision="fp32", mode="default", graph=False)
NCHW, NHWC = dict(layout="nchw", linear=False), dict(layout="nhwc", linear=True)

# On a processor all computes in f32.
CPU = {
    "P0 eager": {**EAGER, **NCHW, "batch_emb": False, "opt": "foreach"},
    "P0 eager, fused AdamW": {**EAGER, **NCHW, "opt": "fused"},
    "P1 channels_last": {**EAGER, **NHWC, "opt": "fused"},
    "P2 torch.compile": {**COMPILED, **NCHW, "opt": "fused"},
    "P2 torch.compile, channels_last": {**COMPILED, **NHWC, "opt": "fused"},
}

# On a GPU: as the reference's loop (f32, TF32 products); with bf16 autocast and channels_last; the same compiled.
P0 = {**EAGER, **NCHW, "batch_emb": False, "opt": "foreach"}
P1 = dict(precision="autocast", mode=None, graph=False, opt="fused")
P2 = dict(precision="autocast", graph=False, opt="fused")
CUDA = {"P0 eager": P0, "P1 eager, autocast, channels_last": P1, "P2 torch.compile": P2}
P3 = "P3 best of the sweep"

# What a greedy sweep tries: each entry changes the fastest variant so far and stays if it is faster.
TRAIN_SWEEP = [("bf16 weights, flat optimiser, graph", {}), ("norm sums", dict(norm="sums")),
               ("norm nhwc", dict(norm="nhwc")), ("autocast", dict(precision="autocast")),
               ("1x1 as conv", dict(linear=False)), ("1x1 as conv, as product", dict(linear=False, inductor={"conv_1x1_as_mm": True})),
               ("fused optimiser", dict(opt="fused")),
               ("max-autotune-no-cudagraphs", dict(mode="max-autotune-no-cudagraphs")),
               ("reduce-overhead", dict(mode="reduce-overhead", graph=False)), ("nchw", NCHW),
               ("force layout", dict(inductor={"force_layout_optimization": True})),
               ("coordinate descent", dict(inductor={"coordinate_descent_tuning": True})),
               ("single projections", dict(batch_emb=False)),
               ("autotune, cuDNN convs", dict(mode="max-autotune-no-cudagraphs", inductor={"max_autotune_conv_backends": "ATEN"})),
               ("autotune, Triton convs", dict(mode="max-autotune-no-cudagraphs", inductor={
                   "max_autotune_conv_backends": "ATEN,TRITON", "coordinate_descent_tuning": True})),
               ("max-autotune", dict(mode="max-autotune", graph=False)), ("eager in a graph", dict(mode=None))]
SAMPLE_SWEEP = [("compile + graph", {}), ("norm sums", dict(norm="sums")), ("norm nhwc", dict(norm="nhwc")),
                ("freezing", dict(inductor={"freezing": True})),
                ("max-autotune-no-cudagraphs", dict(mode="max-autotune-no-cudagraphs")),
                ("1x1 as conv", dict(linear=False)), ("1x1 as conv, as product", dict(linear=False, inductor={"conv_1x1_as_mm": True})),
                ("reduce-overhead", dict(mode="reduce-overhead", graph=False)), ("inference mode", dict(inference=True)),
                ("autocast", dict(precision="autocast")), ("nchw", NCHW),
                ("force layout", dict(inductor={"force_layout_optimization": True})),
                ("coordinate descent", dict(inductor={"coordinate_descent_tuning": True})),
                ("single projections", dict(batch_emb=False)),
                ("autotune, cuDNN convs", dict(mode="max-autotune-no-cudagraphs", inductor={"max_autotune_conv_backends": "ATEN"})),
                ("autotune, Triton convs", dict(mode="max-autotune-no-cudagraphs", inductor={
                    "max_autotune_conv_backends": "ATEN,TRITON", "coordinate_descent_tuning": True})),
                ("max-autotune", dict(mode="max-autotune", graph=False)), ("eager in a graph", dict(mode=None))]
SWEEPS = dict(train=TRAIN_SWEEP, sample=SAMPLE_SWEEP)


def table_name(kind, config, batch):
    return f"{kind} {config} batch {batch}"


def named_tiers(kind):
    """P0 to P2 on a GPU for training or sampling steps; sampling has no optimiser."""
    return {name: {k: v for k, v in options.items() if kind == "train" or k != "opt"} for name, options in CUDA.items()}


def tried(rows):
    """Rows of a sweep that need not be run again: measured, failed, or stopped for want of time twice."""
    stopped = [r["variant"] for r in rows if str(r.get("note", "")).startswith("stopped")]
    return {r["variant"]: r for r in rows if r["variant"] not in stopped or "ms" in r or stopped.count(r["variant"]) > 1}


def best_of_sweep(tables, kind, config, batch):
    """The fastest variant of a sweep so far: its options, how many were tried of how many."""
    rows, sweep = tables.get(table_name(kind, config, batch), []), SWEEPS[kind]
    known = {name: r for name, r in tried(rows).items() if name.startswith("P3 ")}
    timed = [r for r in known.values() if "ms" in r]
    best = min(timed, key=lambda r: r["ms"]) if timed else None
    return dict(variant=best["variant"] if best else "P3 " + sweep[0][0], options=best["options"] if best else {},
                tried=len(known), of=len(sweep), variants=list(known.values()))
