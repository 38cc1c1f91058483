"""Twitter-2015 and Twitter-2017 as TomBERT published them (Yu and Jiang, IJCAI 2019).

The repository jefferyYu/TomBERT has a folder a data set with train.tsv, dev.tsv and test.tsv, a
row `index, label, image, sentence, aspect` a pair of tweet and aspect. Its headers are not to be
trusted: Twitter-2017's test.tsv names four columns over rows of five. Quotes are plain characters.
"""

from __future__ import annotations

from collections.abc import Iterator

from serving.errors import ConfigError
from serving.posts.places import Place
from serving.posts.post import Post
from serving.posts.reader import Found, Posts, Reading, RowError
from serving.posts.texts import decoded_lines

PARTS = ("train", "dev", "test")
LABELS = {"0": "negative", "1": "neutral", "2": "positive"}
PLACE = "$T$"
"""Stands in the sentence for its aspect."""


class TwitterPosts(Posts):
    """A post a row: the sentence with its aspect in place, then a line `Aspect: ...`.

    The label is `sentiment`, the one towards the aspect. Ids are `train-12`, by part and index.
    The published parts are splits by name; without a split all are read.
    """

    description = "Twitter-2015 or -2017, a folder with train.tsv, dev.tsv, test.tsv, and images"

    def __init__(self, source: Place, reading: Reading) -> None:
        super().__init__(source, reading)
        self._images = _image_folder(source)
        self._parts = [reading.part] if reading.part else self.parts(source)

    @staticmethod
    def matches(source: Place) -> bool:
        """Whether the source has this layout."""
        return bool(TwitterPosts.parts(source))

    @classmethod
    def parts(cls, source: Place) -> list[str]:
        """The published parts that are there."""
        return [part for part in PARTS if (source / f"{part}.tsv").is_file()]

    def _found(self) -> Iterator[Found]:
        for part in self._parts:
            path = self.source / f"{part}.tsv"
            for number, line, is_odd in decoded_lines(path):
                self._is_odd = is_odd
                where = f"{path.name} line {number}"
                cells = [cell.strip() for cell in line.split("\t")]
                if number == 1:
                    self._check_header(where, cells)
                elif line.strip():
                    yield self._row(where, part, cells)

    def _check_header(self, where: str, cells: list[str]) -> None:
        if cells[0].lower() != "index":
            raise self._fault(where, f"{cells!r:.120}, expected a header that starts with 'index'")

    def _row(self, where: str, part: str, cells: list[str]) -> Found:
        try:
            return where, self._post(part, cells)
        except RowError as error:
            id_ = f"{part}-{cells[0]}" if cells[0].isdecimal() else None
            return where, self._unreadable(where, error, id_)

    def _post(self, part: str, cells: list[str]) -> Post:
        if len(cells) != 5 or not cells[0].isdecimal() or cells[1] not in LABELS or not cells[2]:
            raise RowError(
                f"{cells!r:.120}, expected 'index<tab>label<tab>image<tab>sentence<tab>aspect' "
                f"with labels {', '.join(f'{k} ({v})' for k, v in LABELS.items())}",
            )
        index, label, image, sentence, aspect = cells
        if not aspect or PLACE in aspect:
            raise RowError(
                f"aspect={aspect!r:.80}; it stands after the sentence, which has {PLACE}"
            )
        return Post(
            id=f"{part}-{index}",
            text=f"{sentence.replace(PLACE, aspect)}\nAspect: {aspect}",
            images=(self._images / image,),
            labels={"sentiment": LABELS[label]},
        )


def _image_folder(source: Place) -> Place:
    """Where the images are: in the folder or beside it.

    Raises:
        ConfigError: in no place that is looked at; names them.
    """
    year = "2015" if "2015" in source.resolve().name else "2017"
    names = (f"twitter{year}_images", "images")
    places = [folder / name for folder in (source, source.resolve().parent) for name in names]
    for place in places:
        if place.is_dir():
            return place
    raise ConfigError(
        f"data={source.name!r} has no folder of images; put it into {source.name}/ or beside it, "
        f"as {' or '.join(names)}",
        param="data",
    )
