"""Labelling a folder against the backbone alone: python benchmarks/predict.py --load_path RUN --folder IMAGES

Interleaved rounds in one process over the same images: the whole of --predict_dir (reading, decoding, the networks,
predictions.csv), and the frozen backbone on images that are already prepared. Prints images a second and the median of
the rounds' ratios, for a noisy machine changes from one round to the next.
"""

import argparse
import contextlib
import io
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import args
import checkpoints
import images
import models
import MPL
import utils


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load_path", required=True, help="a checkpoint file")
    parser.add_argument("--folder", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    utils.keep_freed_memory()
    given = {"test_mode": True, "load_path": options.load_path, "predict_dir": options.folder}
    start = MPL.find_start(args.configure(**given), agents=[])
    config, saved = start.config, start.saved
    device = utils.pick_device("auto")
    precision = utils.pick_precision(config.amp, device)
    listing = images.Listing("--folder", options.folder)
    paths = listing.paths(0, 10**9)
    origin = saved.backbone
    stages = origin.stages and origin.fingerprint is not None
    backbone = models.build_backbone(config.model_name, config.weights, config.img_size, origin.seed, stages=stages)
    encode = models.Encoder(backbone, device, precision, utils.cache_folder(config.cache_dir))
    encode.expect(len(paths))  # as labelling them does
    prepare = images.Preparation(config.img_size, round(config.img_size * images.EVALUATION_RESIZE))
    batch = torch.stack([images.decode(Path(path), prepare) for path in paths[:128]])
    rates: dict[str, list[float]] = {"predict_dir": [], "backbone alone": []}
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(io.StringIO()):
            began = time.perf_counter()
            folder = checkpoints.RunFolder.named(place, "data", "run")
            MPL.label_predict_dir(
                start._replace(folder=folder), saved, options.folder, device, precision, utils.Signals()
            )
            rates["predict_dir"].append(len(paths) / (time.perf_counter() - began))
        began = time.perf_counter()
        done = 0
        while done < len(paths):
            done += len(encode(batch))
        rates["backbone alone"].append(done / (time.perf_counter() - began))
        print({name: round(each[-1], 1) for name, each in rates.items()}, flush=True)
    middle = {name: statistics.median(each) for name, each in rates.items()}
    ratios = [one / other for one, other in zip(rates["predict_dir"], rates["backbone alone"], strict=True)]
    print(f"{len(paths)} images, images a second:", {name: round(value, 1) for name, value in middle.items()})
    print("rounds:", *(f"{ratio:.2f}" for ratio in ratios))
    print(f"predict_over_backbone={statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
