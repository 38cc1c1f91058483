"""Writes posts in MVSA-Single's layout, so that there is something to label."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from serving.errors import ConfigError
from serving.posts import Post


def export_mvsa(posts: Iterable[Post], folder: Path) -> int:
    """Writes `data/ID.png`, `data/ID.txt` and `labelResultAll.txt`; says how many posts.

    Raises:
        ConfigError: the folder already has posts.
    """
    if (folder / "labelResultAll.txt").exists():
        raise ConfigError(f"--out {folder} already has posts; name another folder", param="out")
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    rows = ["ID\ttext,image"]
    for post in posts:
        (data / f"{post.id}.txt").write_text(post.text + "\n", encoding="utf-8")
        (data / f"{post.id}.png").write_bytes(post.image_bytes()[0])
        rows.append(f"{post.id}\t{post.labels['text']},{post.labels['image']}")
    (folder / "labelResultAll.txt").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return len(rows) - 1
