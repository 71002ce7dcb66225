"""Support sets: published lists read, drawn sets seeded and nested, what is left over held out."""

from pathlib import Path

import pytest

from iqe_jax.data.bmad import Sample
from iqe_jax.data.supports import draw_support, held_out, read_support


def valid_split(normal: int = 6, anomalous: int = 5) -> list[Sample]:
    """Normal and anomalous images that share their file names."""
    return [
        Sample(Path(f"/d/{part}/img/{i}.png"), None, label, f"{part}/{i}.png")
        for label, (part, n) in enumerate((("good", normal), ("ungood", anomalous)))
        for i in range(n)
    ]


def names(samples: list[Sample]) -> list[str]:
    return [s.name for s in samples]


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "2-shot.txt"
    file.write_text(text)
    return file


def test_published_list_in_its_order(tmp_path):
    file = write(tmp_path, "n-0: 3.png 1.png \na-0: 1.png 4.png\n\n")
    chosen = read_support(file, valid_split())
    assert names(chosen) == ["good/3.png", "good/1.png", "ungood/1.png", "ungood/4.png"]
    assert [s.label for s in chosen] == [0, 0, 1, 1]


def test_published_list_with_several_rows(tmp_path):
    file = write(tmp_path, "n-0: 0.png\nn-1: good/img/2.png\r\nn-10: 5.png\na-0: 0.png\na-1:3.png\na-10:\t4.png\n")
    assert names(read_support(file, valid_split(), row=1)) == ["good/2.png", "ungood/3.png"]
    assert names(read_support(file, valid_split(), row=10)) == ["good/5.png", "ungood/4.png"]
    with pytest.raises(ValueError, match=r"2-shot\.txt has no row 'n-2' .* rows are n-0, a-0, n-1, a-1, n-10, a-10"):
        read_support(file, valid_split(), row=2)


def test_unknown_names_are_all_named(tmp_path):
    file = write(tmp_path, "n-0: 0.png x.png y.png\na-0: 5.png 1.png\n")  # 5.png is there, but normal
    with pytest.raises(ValueError, match=r"names 3 files .*: n-0: x\.png, n-0: y\.png, a-0: 5\.png$"):
        read_support(file, valid_split())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no row 'n-0' .* rows are none"),
        ("n-0: 1.png\n", "has no row 'a-0' .* rows are n-0"),
        ("n-0: 1.png\na-0:\n", "has no row 'a-0'"),
        ("n-0: 1.png\nb-0: 1.png\n", "line 2: expected 'n-0: a.png b.png'.* found 'b-0: 1.png'"),
        ("n-0: 1.png\nn-0: 2.png\n", "line 2: row 'n-0' stands there twice"),
        ("n-0: 1.png 2.png 1.png\na-0: 1.png\n", "row 'n-0': 1.png stand there twice"),
    ],
)
def test_faulty_lists(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_support(write(tmp_path, text), valid_split())


def test_missing_list(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no support list at .*4-shot\.txt"):
        read_support(tmp_path / "4-shot.txt", valid_split())


def test_draw_is_seeded_nested_and_independent_of_order():
    valid = valid_split(40, 30)
    draws = {k: draw_support(valid, k, seed=3) for k in (1, 2, 4, 8, 16)}
    for k, chosen in draws.items():
        assert [s.label for s in chosen] == [0] * k + [1] * k
        assert len(set(names(chosen))) == 2 * k
        assert chosen == draw_support(valid[::-1], k, seed=3)
        if 2 * k in draws:
            larger = draws[2 * k]
            assert chosen[:k] == larger[:k]
            assert chosen[k:] == larger[2 * k : 3 * k]
    assert names(draws[4]) != names(draw_support(valid, 4, seed=4))
    # The anomalous draw does not depend on how many normal images there are.
    assert draw_support(valid[5:], 4, seed=3)[4:] == draws[4][4:]


def test_draw_stays_as_it_is():
    # Recorded: a support set of a published result must be drawn again by every later version.
    assert names(draw_support(valid_split(), 2, seed=0)) == ["good/4.png", "good/1.png", "ungood/1.png", "ungood/0.png"]


def test_draw_reaches_every_image():
    valid = valid_split()
    seen = {name for seed in range(60) for name in names(draw_support(valid, 1, seed))}
    assert seen == set(names(valid))


def test_draw_refuses_what_cannot_be():
    with pytest.raises(ValueError, match="6 normal and 6 anomalous images were asked for, but there are 6 and 5"):
        draw_support(valid_split(), 6, seed=0)
    with pytest.raises(ValueError, match="k is 0"):
        draw_support(valid_split(), 0, seed=0)


def test_held_out_is_the_rest_in_order():
    valid = valid_split()
    support = draw_support(valid, 2, seed=1)
    rest = held_out(valid, support)
    assert len(rest) == len(valid) - 4
    assert not set(names(rest)) & set(names(support))
    assert rest == [s for s in valid if s in rest]
    with pytest.raises(ValueError, match=r"not among the valid images: good/99\.png"):
        held_out(valid, [Sample(Path("99.png"), None, 0, "good/99.png")])
