#!/usr/bin/env python3
"""Unpack a data set's archive (.zip, .tar, .tar.gz, …), so that nothing lands outside its folder.

    tools/unpack_data.py CUB_200_2011.tgz datasets/cub200

An entry that would lead out of the folder stops it before anything is there; so does one that
would overwrite a file. Archives that share folders (VOC 2007) can be unpacked one after another.
"""

import _checkout  # isort: skip


from data.archives import unpack


def main() -> None:
    """Unpack and say what came."""
    parser = _checkout.Parser(__doc__)
    parser.add_argument("archive", metavar="ARCHIVE")
    parser.add_argument(
        "folder", type=_checkout.folder, metavar="FOLDER", help="made if it is missing"
    )
    arguments = parser.parse_args()
    names = unpack(arguments.archive, arguments.folder)
    print(f"{arguments.folder}: {', '.join(names)}")


if __name__ == "__main__":
    _checkout.run(main)
