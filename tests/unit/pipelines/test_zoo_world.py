"""The world's drawings, its words, and the judges that tell from pixels what a picture shows."""

from collections import Counter

import numpy as np
import pytest

from pipelines.zoo import judges, world
from pipelines.zoo.training import text

JUDGED = ("background", "colour", "shape", "position", "style")


@pytest.mark.parametrize("style", world.STYLES)
def test_the_judges_tell_true_drawings(style: str) -> None:
    rng = np.random.default_rng(1)
    right: Counter[str] = Counter()
    for _ in range(200):
        scene = world.scene(rng).styled(style)
        seen = judges.look(world.draw(scene))
        right.update(name for name in JUDGED if getattr(seen, name) == getattr(scene, name))

    assert {name: right[name] >= 198 for name in JUDGED} == dict.fromkeys(JUDGED, True)


def test_the_judges_bear_noise_and_another_size() -> None:
    rng = np.random.default_rng(2)
    for _ in range(40):
        scene = world.scene(rng)
        noisy = world.draw(scene, 192) + rng.normal(0, 8, (192, 192, 3))
        seen = judges.look(noisy.clip(0, 255).astype(np.uint8))

        assert (seen.background, seen.shape, seen.position) == (scene.background, scene.shape, scene.position)


def test_a_picture_without_a_shape_shows_none() -> None:
    empty = np.full((64, 64, 3), world.BACKGROUNDS["pink"], np.uint8)

    assert judges.look(empty) == judges.Seen("pink")


def test_edges_agree_with_themselves_and_not_with_another_place() -> None:
    rng = np.random.default_rng(3)
    left = world.draw(world.scene(rng, shape="circle", position="left"))
    right = world.draw(world.scene(rng, shape="circle", position="right"))

    assert judges.edge_iou(left, left) == 1
    assert judges.edge_iou(left, right) < 0.2


def test_agreement_counts_only_what_was_asked() -> None:
    rng = np.random.default_rng(4)
    picture = world.draw(world.scene(rng, colour="red", shape="square"))
    asked = [{"colour": "red", "shape": "circle"}, {"colour": "red"}]

    assert judges.agreement([picture, picture], asked) == {"colour": 1.0, "shape": 0.0}


def test_a_scene_is_what_was_fixed_and_lies_within_the_picture() -> None:
    rng = np.random.default_rng(5)
    for fixed in world.every():
        scene = world.scene(rng, **fixed)

        assert fixed.items() <= {name: getattr(scene, name) for name in fixed}.items()
        assert all(scene.radius < middle + 0.02 < 1.04 - scene.radius for middle in (scene.x, scene.y))


def test_captions_say_the_scene_and_nothing_else() -> None:
    rng = np.random.default_rng(6)
    for _ in range(100):
        scene = world.scene(rng)
        said = world.caption(scene, rng, dict.fromkeys(world.ATTRIBUTES, True)).replace(",", " ").split()

        for name in ("background", "colour", "shape"):
            assert {each for each in world.ATTRIBUTES[name] if each in said} == {getattr(scene, name)}


def test_both_tokenizers_know_every_word_of_the_world_as_one_piece() -> None:
    clip, t5 = text.clip_tokenizer(), text.t5_tokenizer()
    words = [word for word in world.words() if word.isalpha()]

    assert [clip.tokenize(word) for word in words] == [[f"{word}</w>"] for word in words]
    assert [t5.tokenize(word) for word in words] == [[f"▁{word}"] for word in words]
    assert clip.eos_token_id == max(clip.get_vocab().values())
    assert text.clip_tokenizer("!").pad_token_id == 0


def test_other_words_are_spelled() -> None:
    assert text.clip_tokenizer().tokenize("cat") == ["c", "at</w>"]
    assert text.t5_tokenizer().tokenize("cat") == ["▁", "c", "a", "t"]
