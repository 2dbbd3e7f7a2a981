"""Make data/emoji.npz from the npm package emoji-datasource-google 16.0.0 (Noto Emoji).

A developer's tool, kept to show where the committed file comes from:

    npm pack emoji-datasource-google@16.0.0
    python tools/convert_emoji.py emoji-datasource-google-16.0.0.tgz data/emoji.npz

Each 64-pixel picture is laid on white and averaged over 2 x 2 pixels. Of the five skin tones the
first, third and last are taken, of couples those of equal tone. `FAMILIES` says which of Unicode's
subgroups are one class. One emoji in ten of each class is held out: all its skin tones and genders
lie on the same side. Flags that are drawn as another country's in the training set are left out of
the held-out set.
"""

import argparse
import hashlib
import io
import json
import tarfile
from collections import defaultdict
from pathlib import Path

import numpy as np
from convert_mnist import write_npz
from PIL import Image

TONES = {"1F3FB", "1F3FD", "1F3FF"}
# Code points in which only the gender differs, and those that say nothing but it.
GENDERS = {"1F468": "1F9D1", "1F469": "1F9D1"}
SIGNS = {"2640", "2642", "FE0F"}
# class: Unicode's subgroups. Finer than its nine groups, and put together by what they look like.
FAMILIES = {
    "smileys": "face-affection face-concerned face-costume face-glasses face-hand face-hat "
    "face-negative face-neutral-skeptical face-sleepy face-smiling face-tongue face-unwell",
    "hearts": "heart",
    "people": "person person-role person-gesture person-fantasy",
    "activities": "person-activity person-sport person-resting",
    "couples": "family person-symbol",
    "hands": "hand-fingers-closed hand-fingers-open hand-fingers-partial hand-prop "
    "hand-single-finger hands body-parts",
    "mammals": "animal-mammal animal-amphibian cat-face monkey-face",
    "birds": "animal-bird",
    "sea-and-bugs": "animal-marine animal-reptile animal-bug",
    "plants": "plant-flower plant-other",
    "fruit": "food-fruit food-vegetable",
    "meals": "food-asian food-prepared food-sweet",
    "drinks": "drink dishware",
    "places": "place-building place-religious place-other place-geographic",
    "vehicles": "transport-ground transport-water transport-air",
    "sky": "sky_&_weather place-map",
    "clocks": "time",
    "games": "sport game award-medal",
    "celebrations": "event arts_&_crafts",
    "clothing": "clothing",
    "tools": "tool lock science medical",
    "household": "household hotel other-object money",
    "office": "book-paper office writing mail",
    "electronics": "computer phone light_&_video",
    "music": "music musical-instrument sound",
    "signs": "alphanum keycap arrow av-symbol transport-sign religion",
    "symbols": "geometric zodiac other-symbol math punctuation warning gender currency emotion",
    "flags": "country-flag flag subdivision-flag",
}
CLASS_OF = {group: name for name, groups in FAMILIES.items() for group in groups.split()}


def pictures(emoji):
    """(code points, file) of each picture to take of one emoji: itself, and its skin tones."""
    yield emoji["unified"], emoji["image"]
    for tones, variant in emoji.get("skin_variations", {}).items():
        if len(set(tones.split("-"))) == 1 and tones.split("-")[0] in TONES:
            yield variant["unified"], variant["image"]


def kin(emoji):
    """What is the same for emoji that differ in gender alone."""
    points = [GENDERS.get(point, point) for point in emoji["unified"].split("-")]
    points = [point for point in points if point not in SIGNS]
    return "-".join(points).removesuffix("-200D") or emoji["unified"]


def picture(data):
    """A PNG of 64 x 64 pixels with alpha -> uint8 [3, 32, 32] on white."""
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    if image.size != (64, 64):
        raise ValueError(f"expected 64 x 64 pixels, got {image.size}")
    values = np.asarray(image, dtype=np.float64)
    alpha = values[..., 3:] / 255
    flat = values[..., :3] * alpha + 255 * (1 - alpha)
    small = flat.reshape(32, 2, 32, 2, 3).mean(axis=(1, 3))
    return np.rint(small).astype(np.uint8).transpose(2, 0, 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("package", type=Path)
    parser.add_argument("output", type=Path)
    args = parser.parse_args()

    with tarfile.open(args.package) as package:
        files = {
            Path(member.name).name: package.extractfile(member).read()
            for member in package
            if member.name.startswith("package/img/google/64/")
            or member.name == "package/emoji.json"
        }
    kinds = defaultdict(lambda: defaultdict(list))
    for emoji in sorted(json.loads(files["emoji.json"]), key=lambda emoji: emoji["sort_order"]):
        if emoji["has_img_google"] and emoji["category"] != "Component":
            name = CLASS_OF[emoji["subcategory"].replace(" ", "_")]
            kinds[name][kin(emoji)].append(emoji)

    parts = {"train": [], "test": []}
    random = np.random.RandomState(0)  # whose stream is frozen by numpy
    for label, name in enumerate(FAMILIES):
        order = random.permutation(len(kinds[name]))
        held_out = {int(place) for place in order[: round(len(order) / 10)]}
        for place, relatives in enumerate(kinds[name].values()):
            part = parts["test" if place in held_out else "train"]
            for emoji in relatives:
                for code, file in pictures(emoji):
                    part.append((picture(files[file]), label, code.lower(), emoji["name"].lower()))

    trained = {image.tobytes() for image, *_ in parts["train"]}
    parts["test"] = [row for row in parts["test"] if row[0].tobytes() not in trained]

    arrays = {"class_names": np.array(list(FAMILIES))}
    for split, rows in parts.items():
        images, labels, codes, names = zip(*rows, strict=True)
        arrays |= {
            f"{split}_images": np.stack(images),
            f"{split}_labels": np.array(labels, dtype=np.uint8),
            f"{split}_codes": np.array(codes),
            f"{split}_names": np.array(names),
        }
    write_npz(args.output, arrays)
    for name, array in arrays.items():
        print(f"{name}: {array.dtype} {list(array.shape)}")
    for label, name in enumerate(FAMILIES):
        counts = [int((arrays[f"{split}_labels"] == label).sum()) for split in parts]
        print(f"{label:2} {name}: {counts[0]} + {counts[1]}")
    digest = hashlib.sha256(args.output.read_bytes()).hexdigest()
    print(f"{args.output}: {args.output.stat().st_size:,} bytes, sha256 {digest}")


if __name__ == "__main__":
    main()
