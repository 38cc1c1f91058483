"""Posts and their readers: data sets as published, folders, JSONL, CSV, conversations.

Readers yield; nothing is decoded here, an image stays a path, a data URL or bytes until the server
or the trainer admits it. Texts of real data sets are not clean UTF-8: see `read_text`.
"""

from serving.posts.check import FAULTS, Checked, Fault, check_post
from serving.posts.ids import LIST_SUFFIX, Duplicates, IdList, IdSet
from serving.posts.mvsa import MVSA_LABELS, merge_labels
from serving.posts.places import Place, UrlPath, find_place
from serving.posts.post import IMAGE_SUFFIXES, DataUrl, ImageSource, Post, Unreadable
from serving.posts.reader import Posts
from serving.posts.registry import LAYOUTS, find_layout, known_splits, read_posts
from serving.posts.rows import Row
from serving.posts.texts import read_text

__all__ = [
    "FAULTS",
    "IMAGE_SUFFIXES",
    "LAYOUTS",
    "LIST_SUFFIX",
    "MVSA_LABELS",
    "Checked",
    "DataUrl",
    "Duplicates",
    "Fault",
    "IdList",
    "IdSet",
    "ImageSource",
    "Place",
    "Post",
    "Posts",
    "Row",
    "Unreadable",
    "UrlPath",
    "check_post",
    "find_layout",
    "find_place",
    "known_splits",
    "merge_labels",
    "read_posts",
    "read_text",
]
