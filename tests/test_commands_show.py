"""`show`'s table in a terminal."""

from attention_transfer.commands import show

MARKDOWN = r"""What it shows, over 2 seeds.

| run   |   test accuracy, % |   published: ImageNet-1K, ViT-L/16, MAE: accuracy, % |
|:------|-------------------:|-----------------------------------------------------:|
| a \| b | 1.50 \[1.00, 2.00\] |                                                 83.0 |
| c     |                  – |                                                   85 |
"""


def test_a_table_is_narrow_and_has_no_escapes() -> None:
    caption, empty, *heading, rule, first, second = show.as_text(MARKDOWN).splitlines()
    assert (caption, empty) == ("What it shows, over 2 seeds.", "")
    assert first.split("  ")[0] == "a | b"
    assert first.split()[3:] == ["1.50", "[1.00,", "2.00]", "83.0"]
    assert second.split() == ["c", "–", "85"]
    assert " ".join(" ".join(heading).split()).count("ImageNet-1K") == 1
    assert max(map(len, [*heading, rule, first, second])) < 60
