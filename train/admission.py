"""Which posts of a data set a training or an evaluation can use."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from serving.errors import ConfigError
from serving.posts import Post
from serving.structures import LabelStructure
from train.examples import check_labels
from train.sight import broken_image


@dataclass
class Admission:
    """Lets posts through, and counts those it leaves out because the user asked for that.

    Attributes:
        structure: every post needs a label in each of its fields.
        skip_unlabelled: leave out posts without one.
        skip_broken: leave out posts with an image that is missing or does not open.
        skipped: posts left out, by reason.
        examples: the first few of them.
    """

    structure: LabelStructure
    skip_unlabelled: bool = False
    skip_broken: bool = False
    skipped: dict[str, int] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)

    def admit(self, posts: Iterable[Post]) -> list[Post]:
        """Posts that can be used, in order.

        Raises:
            ConfigError: one cannot, and it was not asked to leave such out; names it. Or none is
                left.
        """
        admitted, seen = [], 0
        for post in posts:
            seen += 1
            if self._fits(post):
                admitted.append(post)
        if not admitted:
            raise ConfigError(
                f"no usable posts among {seen}; left out were {self.skipped or 'none'}",
                param="data",
            )
        return admitted

    def _fits(self, post: Post) -> bool:
        if not post.text and not post.images:
            raise ConfigError(
                f"post {post.id!r} has neither text nor image; remove it", param="data"
            )
        if self.skip_unlabelled:
            try:
                check_labels(self.structure, post)
            except ConfigError:
                return self._skip(post, "unlabelled")
        else:
            check_labels(self.structure, post)
        if self.skip_broken and any(broken_image(image) for image in post.images):
            return self._skip(post, "broken image")
        return True

    def _skip(self, post: Post, reason: str) -> bool:
        self.skipped[reason] = self.skipped.get(reason, 0) + 1
        if len(self.examples) < 5:
            self.examples.append(f"{post.id}: {reason}")
        return False
