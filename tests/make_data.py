"""Write the part of the recorded arrays that travels with the tests (under 2 MB).

    python tests/make_data.py GOLDEN_FOLDER

What is recorded, and how, stands in GOLDEN_FOLDER's README. Here: the smaller cases, without the
released code's defects (`official`), and without what the tests do not read.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent / "data"

HORIZONTAL = [
    "all_onehot_rho0",
    "odd5_easy3_onehot",
    "b8_easy7_onehot_rho005",
    "b3_easy1_rho0",
    "b2_all_soft",
    "nomix_large_rho",
    "none_easy",
]
# For each file, the arrays that list its cases, and the cases that are kept.
CASES = {
    "htm_mean": [("cases", HORIZONTAL)],
    "htm_cls": [("cases", HORIZONTAL)],
    "vtm": [
        ("select_cases", ["mean_k3", "mean_k1", "mean_allN", "cls_k3", "cls_k1"]),
        ("attend_cases", ["k3_L2", "k1_L1", "vit_k3_L3"]),
    ],
    "tlalign": [("cases", ["box_a_ls01", "box_b_ls0", "empty_box_ls01", "full_box_ls0"])],
    "tlalign_cutmix": [],
    "tokenmix_target": [
        (
            "dense_cases",
            [
                "gamma_block_ls0",
                "gamma_half",
                "zero_map",
                "same_class",
                "mask_none",
                "mask_all",
                "concentrated_corner",
            ],
        ),
        ("topk_cases", ["full_crop"]),
    ],
    "cct": [
        (
            "runs",
            [
                "htm_all_repaired",
                "htm_part_repaired",
                "vtm_official",
                "hvtm_part_repaired_post",
                "vhtm_part_repaired",
            ],
        )
    ],
    "vit_htm": [
        (
            "runs",
            ["htm_all_repaired", "htm_part_repaired", "vtm_repaired", "hvtm_part_repaired_post"],
        )
    ],
}
UNREAD = re.compile(
    r"^(htm_.*|vtm):.*_official$|^htm_.*:.*/perm$|^vtm:.*/(kv|query)_input$"
    r"|^tlalign:.*/(tokens_layers|attn_label_layers)$"
    r"|^tokenmix_target:(dense|topk)_.*/(maps|images|images_mixed|label_tensor.*|crop)$"
    r"|^tokenmix_target:stats_.*/sample_masks$"
    r"|^(cct|vit_htm):.*/vtokens$"
)


def dropped_cases(file: str, data: np.lib.npyio.NpzFile) -> set[str]:
    """First parts of the keys that belong to cases which are not kept."""
    dropped = set()
    for listing, kept in CASES[file]:
        prefix = listing.removesuffix("cases") if listing != "runs" else ""
        dropped |= {f"{prefix}{case}" for case in data[listing].tolist() if case not in kept}
    return dropped


def main(folder: Path) -> None:
    """Write `arrays.npz` and `index.json`."""
    arrays: dict[str, np.ndarray] = {}
    index: dict[str, dict[str, str]] = {}
    for file, listings in CASES.items():
        data = np.load(folder / f"{file}.npz")
        dropped = dropped_cases(file, data)
        kept_cases = dict(listings)
        index[file] = {}
        for key in data.files:
            if key.split("/")[0] in dropped or UNREAD.search(f"{file}:{key}"):
                continue
            value = data[key]
            if key in kept_cases:
                value = value[np.isin(value, kept_cases[key])]
            content = value.tobytes() + str((value.dtype, value.shape)).encode()
            digest = hashlib.sha256(content).hexdigest()[:16]
            arrays[digest] = value
            index[file][key] = digest
    HERE.mkdir(exist_ok=True)
    np.savez_compressed(HERE / "arrays.npz", **arrays)
    (HERE / "index.json").write_text(json.dumps(index, separators=(",", ":"), sort_keys=True))
    for path in (HERE / "arrays.npz", HERE / "index.json"):
        print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
