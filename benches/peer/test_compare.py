"""What compare.py measures, and above all what it refuses to, with stand-ins for the processes of both sides and for nvidia-smi.

    python3 -B -m unittest discover -s benches/peer        # needs neither PyTorch nor a GPU
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import unittest
from unittest import mock

import compare
import gpu
import sides
import tiers
from tables import markdown

LOST = []  # sides that end in the middle of their blocks
SCATTER = [1.0, 1.1, 0.9, 1.05, 0.95, 1.0]
SECONDS = dict(iddpm=0.001, P0=0.009, P1=0.004, P2=0.003, P3=0.002)
SMI = {"compute-apps": [], "utilization.gpu": [["0"]],
       "name": [["Fake GPU", "580.1", "9.0", "1980", "2619", "81559", "700.00"]]}


class Side:
    """A side whose every block takes the same time under the same clock."""

    def __init__(self, name, precision, batch, seconds, clock, params, dies):
        self.name, self.seconds, self.clock, self.dies, self.blocks = name, seconds, clock, dies, []
        self.answer = dict(ready=True, params=params, batch=batch, threads=2, precision=precision, used_bytes=5_000_000, floor_ms=0.5)
        self.process = mock.Mock()

    def start(self, until=None):
        if self.dies:
            raise RuntimeError(self.dies)
        self.head = self.answer

    def block(self, watch=None):
        if self.name in LOST and len(self.blocks) == 2:
            raise RuntimeError("the GPU was lost")
        self.blocks.append(dict(s=self.seconds, calls=10, foreign=0.01, sm_mhz=self.clock))
        return self.blocks[-1]

    def stop(self):
        pass


class Compare(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)
        self.set(seconds=SECONDS)

    def set(self, seconds=SECONDS, clocks={}, params={}, dies={}, golden=True, peer_losses=SCATTER[::-1], smi={}):
        """What the stand-ins say: by side, or of the GPU."""
        self.seconds, self.clocks, self.params, self.dies, self.golden = seconds, clocks, params, dies, golden
        self.losses, self.smi = peer_losses, {**SMI, **smi}

    def side(self, name, precision, batch):
        known = name.split()[0]
        return Side(name, precision, batch, self.seconds[known], self.clocks.get(known, 1980.0), self.params.get(known, 100),
                    self.dies.get(known))

    def answer(self, query, which="gpu"):
        return next((rows for name, rows in self.smi.items() if name in query or name == which), None)

    def ours(self, o, workload):
        return self.side("iddpm", o.precision if o.device == "cuda" else "f32", workload["batch"])

    def peer(self, o, name, options, workload):
        f32 = "f32" if o.device == "cpu" else "f32 (TF32)"
        return self.side(name, f32 if options.get("precision") == "fp32" else "bf16", workload["batch"])

    def compare(self, *flags, device="cuda"):
        """The record of a comparison; None, with the reason in self.why, where nothing is measured."""
        parser = compare.arguments()
        given = ["--device", device, "--python", "python", "--out", str(self.folder), "--work", str(self.folder), "--configs", "tiny",
                 "--sample-configs", "", "--rounds", "5", "--limit-s", "0.1", *flags]
        o = compare.defaults(parser.parse_args(given), parser.error)
        results = {"train tiny batch 128": [dict(variant="P3 norm sums", options=dict(norm="sums"), ms=1.0),
                                            dict(variant="P3 nchw", options={}, ms=2.0)]}
        (self.folder / "results.json").write_text(json.dumps(results))
        patches = [mock.patch.object(compare.sides, "ours", self.ours), mock.patch.object(compare.sides, "peer", self.peer),
                   mock.patch.object(gpu, "smi", self.answer), mock.patch.object(gpu, "Watch", mock.MagicMock),
                   mock.patch.object(gpu, "PATIENCE_S", 0), mock.patch.object(compare, "calm", lambda: True),
                   mock.patch.object(compare, "check_peer", lambda o: (self.golden, ["done"])),
                   mock.patch.object(compare, "curves", lambda o: dict(compare.agreement(SCATTER, self.losses), config="tiny",
                                                                       steps=60, precision="bf16")),
                   mock.patch.object(compare.subprocess, "run", lambda *a, **k: mock.Mock(stdout="9", returncode=0)),
                   mock.patch.object(compare, "say", lambda text: None)]
        for patch in patches:
            patch.start()
        try:
            self.why = compare.refusal(o)
            if self.why:
                return None
            record = compare.measure(o)
        finally:
            for patch in patches:
                patch.stop()
        record["gpu_range"] = None
        (self.folder / f"{o.name}.json").write_text(json.dumps(record))
        self.table = markdown(record)
        return record

    def reason(self, *flags, **settings):
        """Why the only row has no ratio; the table says it too."""
        self.set(**settings)
        row, = self.compare(*flags)["rows"]
        self.assertNotIn("ratio", row)
        self.assertIn(row["no_ratio"], self.table)
        return row["no_ratio"]

    def refused(self, *flags, **settings):
        self.set(**settings)
        self.assertIsNone(self.compare(*flags))
        return self.why

    def test_the_ratio_is_to_the_fastest_variant_of_the_same_precision(self):
        record = self.compare()
        row, = record["rows"]
        self.assertEqual((row["ratio"], row["best_peer"], row["batch"]), (2.0, tiers.P3, 128))
        self.assertEqual(sorted(row["ratios"]), ["P1 eager, autocast, channels_last", "P2 torch.compile", tiers.P3])
        self.assertEqual(row["sides"]["P0 eager"]["ms"], 9.0)
        self.assertEqual((row["p3"]["options"], row["p3"]["tried"]), (dict(norm="sums"), 2))
        self.assertTrue(row["unfinished"], "the sweep has more to try")
        for part in ("Fake GPU", "**2.00**", "bf16, P0 f32 (TF32)", "| 0.5 | 5 | 5 |", "best of 2 of 17 tried", "they agree", "passed"):
            self.assertIn(part, self.table)

    def test_ours_in_f32_is_held_against_no_bf16(self):
        self.assertEqual(self.reason("--precision", "f32"), "no variant of the peer ran in f32")

    def test_a_clock_that_differs_under_the_two_sides_counts_no_pair(self):
        why = self.reason(clocks=dict(P3=1600.0))
        self.assertIn("the clock changed", why)
        self.assertIn("1600 to 1980 MHz", why)
        self.assertIn("is not known", self.reason(clocks=dict(iddpm=None)))
        self.set(clocks=dict(P1=1950.0, P2=1990.0, P3=2000.0))
        self.assertEqual(self.compare()["rows"][0]["ratio"], 2.0, "within 3 % it is the same clock")

    def test_checks_that_fail_leave_no_ratio(self):
        self.assertIn("golden", self.reason(golden=False))
        self.assertIn("losses", self.reason(peer_losses=[9.0 + x for x in SCATTER]))
        self.assertIn("200 params, ours 100", self.reason(params=dict(P3=200)))

    def test_a_side_that_does_not_start_is_named(self):
        self.assertEqual(self.reason(dies=dict(P2="out of memory")), "P2 torch.compile was not measured")
        self.assertIn("tiny at 128, P2 torch.compile: not measured: out of memory", self.table)
        self.assertEqual(self.reason(dies=dict(iddpm="no kernel")), "not measured: no kernel")
        self.set(dies=dict(P0="out of memory"))
        self.assertEqual(self.compare()["rows"][0]["ratio"], 2.0, "the tier of another precision is in no ratio")

    def test_a_side_that_ends_in_the_middle_is_named_and_the_next_row_is_measured(self):
        for side in ("P2 torch.compile", "iddpm"):
            with mock.patch.dict(globals(), LOST=[side]):
                lost, = self.compare()["rows"]
            self.assertEqual(lost["notes"][side], "stopped: the GPU was lost")
            self.assertIn("the GPU was lost" if side == "iddpm" else "was not measured", lost["no_ratio"])
            self.assertNotIn("ratio", lost)
        with mock.patch.dict(globals(), LOST=["P0 eager, fused AdamW"]):
            self.assertNotIn("ratio", self.compare(device="cpu")["rows"][0])

    def test_a_call_that_is_killed_leaves_the_rows_before(self):
        ours = self.ours
        def killed(o, workload):
            if workload["config"] == "cifar10":
                raise KeyboardInterrupt
            return ours(o, workload)
        with mock.patch.object(self, "ours", killed), self.assertRaises(KeyboardInterrupt):
            self.compare("--resume", "--configs", "tiny,cifar10")
        row, = json.loads((self.folder / "cuda.json").read_text())["rows"]
        self.assertEqual((row["config"], row["ratio"]), ("tiny", 2.0))
        self.assertIn("**2.00**", (self.folder / "cuda.md").read_text())
        self.assertEqual([p.name for p in self.folder.glob(".*.part")], [])

    def test_a_gpu_in_use_is_not_measured(self):
        busy = dict(smi={"compute-apps": [["77", "train", "900"]]})
        with mock.patch.object(gpu, "in_use", lambda: None):
            self.set()
            self.compare()
        self.assertIn("process 77 (train) holds 900 MiB", self.refused(**busy))
        self.assertIn("utilisation is 40 %", self.refused(smi={"utilization.gpu": [["40"]]}))
        answers = iter([None, None, "busy GPU: process 5 (other) holds 1 MiB"])  # at the start, before the row, after it
        with mock.patch.object(gpu, "in_use", lambda: next(answers)):
            self.assertIn("process 5", self.reason())

    def test_what_is_missing_is_said(self):
        self.assertIn("no device", self.refused(smi={"name": None}))
        self.assertIn("lacks torch", self.refused("--python", "", "--peer-missing", "this Python lacks torch"))
        o = mock.Mock(python="python", device="cuda")
        for status, out, part in ((0, "7", "compute capability 7.x: both sides compute in bf16, which needs 8.0"),
                                  (1, "", "PyTorch sees no GPU")):
            done = subprocess.CompletedProcess([], status, out, "Traceback\nAssertionError: PyTorch sees no GPU\n")
            with mock.patch.object(compare, "finished", lambda *a, **k: done):
                self.assertIn(part, compare.peer_refuses(o))
        with mock.patch.object(compare, "peer_refuses", lambda o: "compute capability 7.x"):
            self.assertEqual("compute capability 7.x", self.refused())
        with mock.patch.object(compare, "we_refuse", lambda o: "error: this binary holds kernels for sm_80"):
            self.assertIn("sm_80", self.refused())

    def test_a_call_ends_in_time_and_the_next_goes_on(self):
        first, = self.compare("--limit-minutes", "0.5")["rows"]
        self.assertEqual((first["no_ratio"], first["unfinished"]), ("no time left: call again with --resume", True))
        self.assertEqual(self.compare("--resume")["rows"][0]["ratio"], 2.0)
        self.set(seconds={**SECONDS, "P3": 0.0025})
        kept = self.compare("--resume", "--limit-minutes", "0.5")["rows"][0]
        self.assertEqual(kept["ratio"], 2.0, "a row that was measured is not lost for want of time")
        self.assertEqual(self.compare("--resume")["rows"][0]["ratio"], 2.5, "its sweep was not complete")
        both = self.compare("--resume", "--configs", "cifar10")["rows"]
        self.assertEqual([r["config"] for r in both], ["tiny", "cifar10"])

    def test_on_a_processor_all_variants_are_timed_together(self):
        row, = self.compare(device="cpu")["rows"]
        self.assertEqual((row["batch"], row["precisions"]["iddpm"]), (16, "f32"))
        self.assertEqual(sorted(row["ratios"]), sorted(tiers.CPU))
        self.assertNotIn("p3", row)

    def test_a_toy_run_shows_no_time_and_no_ratio(self):
        row, = self.compare("--toy")["rows"]
        self.assertEqual(row["no_ratio"], "a toy run compares nothing")
        self.assertEqual({side["ms"] for side in row["sides"].values()}, {None})
        self.assertIn("nothing was measured", self.table)
        self.assertNotIn("**1.", self.table)


class Processes(unittest.TestCase):
    def test_what_hangs_is_ended(self):
        done = compare.finished([sys.executable, "-c", "import time; time.sleep(60)"], 0.3)
        self.assertEqual((done.returncode, done.stderr), (124, "no answer within 0 s"))
        program = "import time; print('{}', flush=True); input(); time.sleep(60)"
        side = sides.Side("slow", [sys.executable, "-c", program], dict(os.environ))
        side.start(time.monotonic() + 20)
        with mock.patch.object(sides, "BLOCK_S", 0.3), self.assertRaisesRegex(RuntimeError, "no time left"):
            side.block()
        side.stop()
        self.assertIsNotNone(side.process.returncode)


class Gpu(unittest.TestCase):
    def test_the_clock_of_a_block_is_that_of_its_answers(self):
        watch = gpu.Watch.__new__(gpu.Watch)
        watch.samples, watch.child = [], mock.Mock(stdout=["1980, 2619, 500.1, 60, 0x0000000000000000\n", "no answer\n",
                                                           "345, 2619, 70.0, 31, 0x0000000000000001\n"])
        begin = time.monotonic()
        watch.read()
        self.assertEqual(len(watch.samples), 2)
        self.assertEqual(watch.clock(begin, time.monotonic()), 1980.0, "an idle GPU has no clock")
        self.assertIsNone(watch.clock(begin - 2, begin - 1))
        self.assertEqual(watch.stop(), dict(sm_mhz=[1980.0] * 2, memory_mhz=[2619.0] * 2, power_w=[500.1] * 2,
                                            temperature_c=[60.0] * 2, reasons="0x0", samples=1))
        self.assertTrue(gpu.same_clock(1980, 1925) and not gpu.same_clock(1980, 1755))


class Sweep(unittest.TestCase):
    def test_the_fastest_counts_and_what_time_cut_off_is_tried_again(self):
        rows = [dict(variant="P2 torch.compile", ms=0.1, options={}), dict(variant="P3 norm sums", ms=2.0, options=dict(norm="sums")),
                dict(variant="P3 nchw", ms=1.0, options=dict(layout="nchw")), dict(variant="P3 freezing", note="RuntimeError: no"),
                dict(variant="P3 norm nhwc", note="stopped after 100 s")]
        found = tiers.best_of_sweep({"sample cifar10 batch 1": rows}, "sample", "cifar10", 1)
        self.assertEqual((found["variant"], found["options"], found["tried"], found["of"]), ("P3 nchw", dict(layout="nchw"), 3, 18))
        found = tiers.best_of_sweep({"sample cifar10 batch 1": [*rows, rows[-1]]}, "sample", "cifar10", 1)
        self.assertEqual((found["variant"], found["tried"]), ("P3 nchw", 4), "two stops are enough")
        self.assertEqual(tiers.best_of_sweep({}, "train", "cifar10", 128)["options"], {})


if __name__ == "__main__":
    unittest.main()
