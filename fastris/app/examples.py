"""Pictures to try the page with: scenes of the built-in data set, which no model was trained on."""

from __future__ import annotations

from pathlib import Path

from fastris.data.scenes.dataset import REFERENCES, SyntheticExpressions

SCENES = (0, 1, 2, 3)
"""Their numbers in the validation split of seed 0."""

SIZE = 384  # pixels


def write_examples(folder: Path) -> list[tuple[str, str]]:
    """Draw the scenes into a folder: the path of each, and phrases about it, one a line."""
    data = SyntheticExpressions("val", size=SIZE)
    examples = []
    for number in SCENES:
        path = folder / f"scene_{number + 1}.png"
        first = REFERENCES * number
        from PIL import Image

        Image.fromarray(data.image(first)).save(path)
        sentences = [data.reference(first + which).sentences[which] for which in range(REFERENCES)]
        examples.append((str(path), "\n".join(sentences)))
    return examples
