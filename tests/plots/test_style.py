"""What all pictures share: colours, names and steps."""

import pytest

from lightning_l2.plots.style import COLOURS, draw_curves, label_steps, new_figure, without_common_prefix


def drawn(names: list[str], **options: object) -> dict[str, str]:
    axes = new_figure(4, 3).add_subplot()
    draw_curves(axes, {name: ([0, 1], [float(place), 1.0]) for place, name in enumerate(names)}, **options)
    return {str(line.get_label()): str(line.get_color()) for line in axes.get_lines()}


def test_a_colour_belongs_to_a_name_also_where_others_are_left_out() -> None:
    everything = drawn(["head", "decay", "frozen"])
    assert everything == {"decay": COLOURS[0], "frozen": COLOURS[1], "head": COLOURS[2]}
    assert drawn(["head", "decay"], among=["frozen", "decay", "head"]) == {
        "decay": COLOURS[0],
        "head": COLOURS[2],
    }


def test_equal_curves_have_the_colour_of_the_first_name() -> None:
    axes = new_figure(4, 3).add_subplot()
    draw_curves(axes, {name: ([0, 1], [float(name == "c")] * 2) for name in "bac"})
    assert {line.get_label(): line.get_color() for line in axes.get_lines()} == {"b, a": COLOURS[0], "c": COLOURS[2]}


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["model.conv1", "model.fc"], ["conv1", "fc"]),
        (
            ["a_name_that_is_cut_in_its_middle.weight", "b"],
            ["a_name_that_is…s_middle.weight", "b"],
        ),
        # the middle is what differs
        (
            [*(f"model.encoder.layers.{layer}.self_attention.output.dense.weight" for layer in (0, 1)), "b"],
            ["…layers.0.self_attention.outp…", "…layers.1.self_attention.outp…", "b"],
        ),
        # so do both ends of what is left
        (
            [f"a.{'x' * 20}.{word}_{'y' * 30}_{end}_{'z' * 20}" for word in "pq" for end in "rs"],
            [f"{word}_{'y' * 30}_{end}_{'z' * 20}" for word in "pq" for end in "rs"],
        ),
    ],
)
def test_names_are_short_and_never_look_alike(names: list[str], labels: list[str]) -> None:
    found = without_common_prefix(names)
    assert found == labels
    assert len(set(found)) == len(names)


@pytest.mark.parametrize(("last", "ticks"), [(3, [0, 1, 2, 3]), (570, [0, 100, 200, 300, 400, 500])])
def test_steps_are_whole_and_round(last: int, ticks: list[int]) -> None:
    axes = new_figure(8, 3).add_subplot()
    label_steps(axes)
    axes.set_xlim(0, last)
    assert [tick for tick in axes.get_xticks() if 0 <= tick <= last] == ticks
    assert axes.get_xlabel() == "optimizer step"
