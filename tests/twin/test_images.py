"""Images in predict, and image towers of CLIP with classifiers out of class names; the oracles are the stock classes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTModel,
    pipeline,
)

import twinmerge as tm
from twinmerge.errors import ModelError, TwinmergeError, UsageError
from twinmerge.models.zero_shot import CLIPZeroShotForImageClassification
from twinmerge.tasks.images import as_images, image_of

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
VISION = {**SIZES, "image_size": 8, "patch_size": 4}
CLASSES = {"pets": ["cat", "dog"], "signs": ["stop", "go", "turn left"]}
TEMPLATES = ("a photo of a {}.", "art of the {}", "{}")


def drawn(count: int = 6) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (12, 10, 3), dtype=np.uint8)) for _ in range(count)]


def moved(model: Any, seed: int, spread: float = 0.01) -> Any:
    model, rng = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += spread * torch.randn(parameter.shape, generator=rng)
    return model


def processor() -> ViTImageProcessor:
    return ViTImageProcessor(size={"height": 8, "width": 8})


# ------------------------------------------------------------------------------------------ what is an image


def test_arrays_are_the_images_that_pillow_has() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (12, 10, 4), dtype=np.uint8)
    rgb = pixels[..., :3]
    want = Image.fromarray(rgb)
    for given in (
        want,
        rgb,
        torch.from_numpy(rgb.copy()),
        rgb.transpose(2, 0, 1),
        torch.from_numpy(rgb.copy()).permute(2, 0, 1),
    ):
        found = image_of(given)
        assert found is not None and np.array_equal(np.asarray(found.pixels), rgb)
    for given in (pixels[..., 0], pixels[..., :1], pixels[..., :1].transpose(2, 0, 1)):
        found = image_of(given)
        assert found is not None and np.array_equal(
            np.asarray(found.pixels), np.asarray(Image.fromarray(pixels[..., 0]).convert("RGB"))
        )
    found = image_of(pixels)
    assert found is not None and np.array_equal(
        np.asarray(found.pixels), np.asarray(Image.fromarray(pixels).convert("RGB"))
    )
    assert as_images(["a", "b"]) is None and as_images([np.str_("a")]) is None and as_images([torch.arange(3)]) is None


@pytest.mark.parametrize(
    "given, says",
    [
        (np.zeros((4, 4, 3)), "An array of float64 and shape .* is no image"),
        (np.zeros((4, 4, 3), np.int64), "An array of int64"),
        (np.zeros((3, 4, 3), np.uint8), "Which axis of"),
        (np.zeros((5, 6, 7), np.uint8), "Which axis of"),
        (np.zeros((2, 4, 4, 3), np.uint8), "and shape"),
        (Image.fromarray(np.full((4, 4), 4000, np.int32)), "mode 'I' has more than 8 bits"),
    ],
)
def test_what_cannot_be_told_is_refused(given: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        image_of(given)


# ------------------------------------------------------------------------------------------ ViT


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """A twin of two ViTs with their image processor, and its experts' folders."""
    root = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    base = ViTModel(ViTConfig(**VISION), add_pooling_layer=False).eval()
    base.save_pretrained(root / "base")
    processor().save_pretrained(root / "base")
    experts = {}
    for i, (name, labels) in enumerate(CLASSES.items()):
        config = ViTConfig(**VISION, id2label=dict(enumerate(labels)), label2id={n: k for k, n in enumerate(labels)})
        expert = ViTForImageClassification(config).eval()
        expert.vit.load_state_dict(moved(base, i).state_dict())
        expert.save_pretrained(root / name)
        experts[name] = root / name
    twin = tm.Twin.build(root / "base", experts, None, progress=False)
    twin.fit_router(
        {n: {"pixel_values": torch.randn(20, 3, 8, 8) + 4 * i} for i, n in enumerate(experts)}, progress=False
    )
    return twin.save_pretrained(root / "twin"), experts


@pytest.mark.few(2)
@pytest.mark.parametrize("form", ["pillow", "arrays", "tensors of bytes", "pixel values"])
def test_predict_takes_images(vit: Any, form: str) -> None:
    twin, images = tm.Twin.from_pretrained(vit[0]), drawn()
    values = processor()(images=images, return_tensors="pt")["pixel_values"]
    given: Any = {
        "pillow": images,
        "arrays": [np.asarray(image) for image in images],
        "tensors of bytes": [torch.from_numpy(np.array(image)) for image in images],
        "pixel values": list(values),
    }[form]
    owners = ["pets", "signs", "signs", "pets", "pets", "signs"]
    found = twin.predict(given, detail=True, expert=owners, batch_rows=4)
    for row, (owner, prediction) in enumerate(zip(owners, found, strict=True)):
        model = ViTForImageClassification.from_pretrained(vit[1][owner]).eval()
        with torch.no_grad():
            want = model(pixel_values=values[row : row + 1]).logits[0].softmax(-1)
        assert prediction.label == CLASSES[owner][int(want.argmax())]
        assert prediction.confidence == pytest.approx(want.max().item(), abs=1e-4)
    assert found.to_dict()[0]["text"].startswith(("image of", "pixel values"))


def test_images_are_read_alike_wherever_inputs_are_read(vit: Any) -> None:
    """Images of Pillow give what their finished pixel values give; a twin in bfloat16 reads them too."""
    light = np.random.default_rng(3)
    images = {
        n: [Image.fromarray(light.integers(9 * k, 60 + 99 * k, (12, 10, 3), dtype=np.uint8)) for _ in range(20)]
        for k, n in enumerate(CLASSES)
    }
    values = {
        n: {"pixel_values": processor()(images=some, return_tensors="pt")["pixel_values"]} for n, some in images.items()
    }
    twin = tm.Twin.from_pretrained(vit[0])
    quiet: dict[str, Any] = {"progress": False}
    assert twin.fit_router(images, refuse=0, **quiet) == twin.fit_router(values, refuse=0, **quiet)
    arrays = {n: np.stack([np.asarray(image) for image in some]) for n, some in images.items()}
    assert twin.fit_router(arrays, refuse=0, **quiet) == twin.fit_router(values, refuse=0, **quiet)
    batch = values["pets"]
    for made in (
        lambda given: twin.compress(rank=1, inputs=given, **quiet),
        lambda given: twin.refine(given, steps=2, experts=dict(vit[1]), **quiet),
        lambda given: twin.remove("signs").add("signs", vit[1]["signs"], given["signs"], **quiet),
    ):
        found, wanted = made(images)(**batch, expert="signs").logits, made(values)(**batch, expert="signs").logits
        assert torch.allclose(found, wanted, atol=1e-6)
    half = tm.Twin.from_pretrained(vit[0], dtype="bfloat16")
    assert half.fit_router(images, refuse=0, **quiet).rows == 8


def test_a_twin_says_what_it_reads(vit: Any) -> None:
    twin = tm.Twin.from_pretrained(vit[0])
    for ask in (
        lambda: twin.predict(["a text"]),
        lambda: twin.encode([("a", "b")]),
        lambda: twin.fit_router({"pets": ["a", "b"], "signs": ["c", "d"]}, progress=False),
    ):
        with pytest.raises(UsageError, match="This twin reads images, and .* is none. Give images of Pillow"):
            ask()


def test_images_and_texts_do_not_mix(vit: Any) -> None:
    twin = tm.Twin.from_pretrained(vit[0])
    with pytest.raises(UsageError, match="Some inputs are images, and some are none"):
        twin.predict([drawn()[0], "a text"], expert="pets")
    with pytest.raises(UsageError, match="Pixel values are float tensors of one shape"):
        twin.predict([torch.zeros(3, 8, 8), torch.zeros(3, 4, 4)], expert="pets")


def test_a_pipeline_of_images_answers_as_the_twin(vit: Any) -> None:
    images = drawn()
    wanted = tm.Twin.from_pretrained(vit[0]).predict(images, detail=True)
    classify = pipeline("image-classification", model=str(vit[0]), device="cpu")
    for found, want in zip(classify(images, top_k=1), wanted, strict=True):
        assert found[0]["label"] == want.label and found[0]["score"] == pytest.approx(want.confidence, abs=1e-4)


# ------------------------------------------------------------------------------------------ CLIP


def tokens() -> PreTrainedTokenizerFast:
    """Words of the templates and the classes, with an end as CLIP's, whose id is the largest."""
    names = [
        word for each in (*TEMPLATES, *CLASSES["pets"], *CLASSES["signs"]) for word in each.replace("{}", " ").split()
    ]
    words = {w: i for i, w in enumerate(dict.fromkeys(["<unk>", ".", *(n.strip(".") for n in names)]))}
    words |= {"<end>": 49}
    backend = Tokenizer(models.WordLevel(words, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing("$A <end>", special_tokens=[("<end>", 49)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<end>", eos_token="<end>")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CLIPModel]:
    root = tmp_path_factory.mktemp("clip") / "clip"
    torch.manual_seed(0)
    text = {**SIZES, "vocab_size": 50, "max_position_embeddings": 16, "eos_token_id": 49, "bos_token_id": 0}
    model = CLIPModel(
        CLIPConfig(text_config=text, vision_config={**VISION, "projection_dim": 12}, projection_dim=12)
    ).eval()
    model = moved(model, 7, 0.3)
    model.save_pretrained(root)
    tokens().save_pretrained(root)
    processor().save_pretrained(root)
    return root, model


def test_one_template_gives_the_logits_of_clip(clip: Any) -> None:
    root, model = clip
    for template in TEMPLATES:
        for names in CLASSES.values():
            batch = tokens()([template.replace("{}", n) for n in names], padding=True, return_tensors="pt")
            values = processor()(images=drawn(), return_tensors="pt")["pixel_values"]
            with torch.no_grad():
                want = model(pixel_values=values, input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
                got = tm.zero_shot(str(root), names, [template])(pixel_values=values).logits
            torch.testing.assert_close(got, want.logits_per_image, rtol=1e-4, atol=1e-4)


def test_several_templates_are_the_normalised_mean_of_their_texts(clip: Any, tmp_path: Path) -> None:
    root, model = clip
    tower = moved(model.vision_model, 3)
    names = CLASSES["signs"]
    made = tm.zero_shot(model, names, TEMPLATES, tower=tower, tokenizer=tokens())
    rows = []
    with torch.no_grad():
        for name in names:
            batch = tokens()([t.replace("{}", name) for t in TEMPLATES], padding=True, return_tensors="pt")
            each = model.get_text_features(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            each = each.pooler_output / each.pooler_output.norm(dim=-1, keepdim=True)
            rows.append(each.mean(0) / each.mean(0).norm())
        values = processor()(images=drawn(), return_tensors="pt")["pixel_values"]
        image = model.visual_projection(tower(pixel_values=values).pooler_output)
        want = model.logit_scale.exp() * image / image.norm(dim=-1, keepdim=True) @ torch.stack(rows).T
        torch.testing.assert_close(made(pixel_values=values).logits, want, rtol=1e-4, atol=1e-4)
    made.save_pretrained(tmp_path / "made")
    again = CLIPZeroShotForImageClassification.from_pretrained(tmp_path / "made").eval()
    stock = CLIPVisionModel.from_pretrained(tmp_path / "made").eval()  # the tower alone, for whoever has no twinmerge
    with torch.no_grad():
        assert torch.equal(again(pixel_values=values).logits, made(pixel_values=values).logits)
        assert torch.equal(stock(pixel_values=values).pooler_output, tower(pixel_values=values).pooler_output)
    assert again.config.id2label == dict(enumerate(names))


def test_merges_and_twins_of_image_towers_keep_the_classifiers_as_heads(clip: Any, tmp_path: Path) -> None:
    root, model = clip
    experts, towers = {}, {}
    model.vision_model.save_pretrained(tmp_path / "base")
    processor().save_pretrained(tmp_path / "base")
    for i, (name, names) in enumerate(CLASSES.items()):
        towers[name] = moved(model.vision_model, i + 20, 0.02)
        tm.zero_shot(str(root), names, TEMPLATES, tower=towers[name]).save_pretrained(tmp_path / name)
        experts[name] = tmp_path / name
    values = processor()(images=drawn(), return_tensors="pt")["pixel_values"]
    merge = tm.merge("task_arithmetic", tmp_path / "base", experts, scale=0.3, progress=False)
    loaded, tower = merge.load(), copy.deepcopy(model.vision_model)
    base = model.vision_model.state_dict()
    tower.load_state_dict(
        {
            n: t + 0.3 * sum(e.state_dict()[n] - t for e in towers.values()) if t.is_floating_point() else t
            for n, t in base.items()
        }
    )
    by_hand = {n: tm.zero_shot(str(root), names, TEMPLATES, tower=tower) for n, names in CLASSES.items()}
    with torch.no_grad():
        for name, want in by_hand.items():
            got = loaded(pixel_values=values, head=name).logits
            torch.testing.assert_close(got, want(pixel_values=values).logits, rtol=1e-4, atol=1e-4)
    twin = tm.Twin.build(tmp_path / "base", experts, None, shared="task_arithmetic", progress=False)
    twin = tm.Twin.from_pretrained(twin.save_pretrained(tmp_path / "twin"))
    for name, names in CLASSES.items():
        own = tm.zero_shot(str(root), names, TEMPLATES, tower=towers[name])
        with torch.no_grad():
            want = own(pixel_values=values).logits
        torch.testing.assert_close(twin(pixel_values=values, expert=name).logits, want, rtol=1e-4, atol=1e-3)
        assert twin.predict(drawn(), expert=name) == [names[i] for i in want.argmax(-1).tolist()]
    stock = CLIPVisionModel.from_pretrained(merge.save(tmp_path / "out"))
    assert all(
        torch.equal(t, tower.state_dict()[n]) or torch.allclose(t, tower.state_dict()[n], atol=1e-6)
        for n, t in stock.state_dict().items()
    )


@pytest.mark.filterwarnings("ignore")
def test_cards_of_zero_shot_classifiers_run(clip: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No auto class opens them; the oracle is the class by hand with the weights that the twin says."""
    root, model = clip
    model.vision_model.save_pretrained(tmp_path / "base")
    processor().save_pretrained(tmp_path / "base")
    given: dict[str, dict[str, Any]] = {"heads": {}, "alike": {}}
    for i, (name, names) in enumerate(CLASSES.items()):
        for kind, of in (("heads", names), ("alike", CLASSES["signs"])):
            tower = copy.deepcopy(model.vision_model)
            with torch.no_grad():
                tower.encoder.layers[0].mlp.fc1.weight += 0.01 * (i + 1)
            given[kind][name] = tm.zero_shot(str(root), of, TEMPLATES, tower=tower)
    same = tm.zero_shot(str(root), CLASSES["signs"], TEMPLATES)
    same.save_pretrained(tmp_path / "same")
    processor().save_pretrained(tmp_path / "same")
    alike = tm.merge("average", tmp_path / "same", given["alike"], progress=False)
    merge = tm.merge("average", tmp_path / "base", given["heads"], progress=False)
    twin = tm.Twin.build(tmp_path / "base", given["heads"], 4, shared="average", progress=False)
    twin.save_pretrained(tmp_path / "twin")
    values = processor()(images=drawn(), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        wanted = {
            "alike": alike.load()(pixel_values=values).logits,
            "merged": merge.load()(pixel_values=values, head="pets").logits,
            "dense": given["heads"]["signs"](pixel_values=values).logits,
        }
        wanted["lora"] = wanted["dense"]
        alike.save(tmp_path / "alike")
        merge.save(tmp_path / "merged")
        twin.export("signs", tmp_path / "dense")
        twin.export("signs", tmp_path / "lora", lora=True)
        for name, want in wanted.items():
            card = (tmp_path / name / "README.md").read_text()
            assert name == "lora" or (
                "pipeline_tag: image-classification" in card and "library_name: twinmerge" in card
            )
            code, names = card.split("## Use\n\n```python\n")[1].split("```")[0], dict[str, Any]()
            monkeypatch.chdir(tmp_path / name)
            exec(compile(code, "card", "exec"), names)
            got = names["model"].eval()(pixel_values=values).logits
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)


def test_towers_and_names_that_do_not_fit_are_refused(clip: Any, vit: Any, tmp_path: Path) -> None:
    root, model = clip
    wide = CLIPVisionModel(CLIPVisionConfig(**{**VISION, "hidden_size": 32}))
    calls: list[tuple[Any, type[TwinmergeError], str]] = [
        (lambda: tm.zero_shot(str(root), []), UsageError, "list of class names"),
        (lambda: tm.zero_shot(str(root), ["a", "b", "a"]), UsageError, "'a' stands twice"),
        (lambda: tm.zero_shot(str(root), ["a", " "]), UsageError, "A class has no name"),
        (lambda: tm.zero_shot(str(root), ["unheard", "a", "unknown"]), UsageError, "'unheard' and 'unknown' are the same tokens"),
        (lambda: tm.zero_shot(str(root), ["a"], ["a photo"]), UsageError, 'has no "{}"'),
        (lambda: tm.zero_shot(str(root), ["a"], []), UsageError, "list of templates"),
        (lambda: tm.zero_shot(model, ["a"]), UsageError, "has no tokenizer"),
        (lambda: tm.zero_shot(str(vit[1]["pets"]), ["a"]), ModelError, "is a ViTForImageClassification, and not a CLIPModel"),
        (lambda: tm.zero_shot(str(root), ["a"], tower=wide), ModelError, "states of 32 numbers, and this CLIP model projects 16"),
        (lambda: tm.zero_shot(str(root), ["a"], tower=3), ModelError, "3 .* is no CLIPVisionModel"),
    ]  # fmt: skip
    for call, kind, says in calls:
        with pytest.raises(kind, match=says):
            call()
