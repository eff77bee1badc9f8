#!/usr/bin/env python3
"""Write a data set as shards (few large .tar files), which every step reads as the data set itself.

    tools/make_shards.py /data/imagenet_shards data.name imagenet data.root /data/imagenet
    tools/pretrain.sh ctc --config pretrain/ctc_imagenet.yaml data.root /data/imagenet_shards

Images keep their bytes, labels and indices. Shards that webdataset wrote are read as they are, with
data.name shards.
"""

import _checkout  # isort: skip


def main() -> None:
    """Pack and say what was written."""
    parser = _checkout.Parser(__doc__)
    parser.add_argument(
        "output", type=_checkout.folder, metavar="FOLDER", help="made if it is missing"
    )
    parser.add_argument("--config", help="YAML with the same keys, as given or under configs/")
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="e.g. data.name imagenet")
    arguments = parser.parse_args()
    from core.config import load_config
    from data.pack import PackConfig, pack

    config = load_config(PackConfig, arguments.config, arguments.overrides)
    counts = pack(config, arguments.output)
    told = ", ".join(f"{count:,} images of {split}" for split, count in counts.items())
    print(f"{arguments.output}: {told}; read them with data.root {arguments.output}")


if __name__ == "__main__":
    _checkout.run(main)
