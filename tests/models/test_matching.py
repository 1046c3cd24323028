"""Every tensor of every input: merged, head, from the base, or an error that names it."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from twinmerge.errors import TwinmergeError
from twinmerge.models.matching import match, matches
from twinmerge.models.opening import open_model

CLASSIFIER = ["classifier.bias", "classifier.weight"]


def opened(**models):
    return {name: open_model(model, name) for name, model in models.items()}


def matched(base, experts, patterns=()):
    return match(open_model(base, "base"), opened(**experts), patterns)


def rewrite(path: str, change) -> str:
    tensors = load_file(f"{path}/model.safetensors")
    change(tensors)
    save_file(tensors, f"{path}/model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture(scope="module")
def bert(build):
    return build("BertModel")


def classifier(build, with_body_of, base, labels=("neg", "pos"), seed=1):
    return with_body_of(build("BertForSequenceClassification", seed=seed, id2label=dict(enumerate(labels))), base)


def test_classifier_that_the_base_lacks_is_a_head(build, with_body_of, bert):
    found = matched(bert, {"a": classifier(build, with_body_of, bert), "b": classifier(build, with_body_of, bert)})
    assert found.heads == {"a": CLASSIFIER, "b": CLASSIFIER} and found.head_names == set(CLASSIFIER)
    assert found.merged == sorted(bert.state_dict()) and found.from_base == [] and found.ignored == {"a": [], "b": []}


def test_equal_shapes_and_labels_of_a_common_classifier_are_merged(build, with_body_of, bert):
    models = [classifier(build, with_body_of, bert, seed=s) for s in range(3)]
    found = matched(models[0], {"a": models[1], "b": models[2]})
    assert found.heads == {"a": [], "b": []} and set(CLASSIFIER) <= set(found.merged)


def test_equal_shapes_of_other_labels_are_heads(build, with_body_of, bert):
    base, a = (classifier(build, with_body_of, bert, seed=s) for s in range(2))
    b = classifier(build, with_body_of, bert, labels=("no", "yes"), seed=2)
    found = matched(base, {"a": a, "b": b})
    assert found.heads == {"a": CLASSIFIER, "b": CLASSIFIER}
    assert found.from_base == CLASSIFIER and not set(CLASSIFIER) & set(found.merged)


def test_other_shapes_outside_the_body_are_heads_of_all(build, with_body_of, bert):
    base, a = (classifier(build, with_body_of, bert, seed=s) for s in range(2))
    b = classifier(build, with_body_of, bert, labels="xyz", seed=2)
    assert matched(base, {"a": a, "b": b}).heads == {"a": CLASSIFIER, "b": CLASSIFIER}


def test_a_head_travels_whole(build, with_body_of):
    """classifier.dense has one shape in all; it goes with the out_proj that has not."""
    base, a = (build("RobertaForSequenceClassification", seed=s) for s in range(2))
    b = build("RobertaForSequenceClassification", seed=2, num_labels=5)
    for model in (a, b):
        with_body_of(model, base)
    head = [f"classifier.{part}.{kind}" for part in ("dense", "out_proj") for kind in ("bias", "weight")]
    found = matched(base, {"a": a, "b": b})
    assert found.heads == {"a": head, "b": head} and found.from_base == head


def test_patterns_of_the_user(build, tuned, bert):
    experts = {"a": tuned(bert, 1)}
    layer = sorted(n for n in bert.state_dict() if n.startswith("encoder.layer.1."))
    assert matched(bert, experts, ["layer.1"]).heads == {"a": layer}
    biases = sorted(n for n in bert.state_dict() if n.endswith("query.bias"))
    found = matched(bert, experts, ["*.query.bias"])
    assert found.heads == {"a": biases} and found.from_base == biases


@pytest.mark.parametrize(
    ("pattern", "name", "yes"),
    [
        ("layers.1", "layers.1", True),
        ("layers.1", "model.layers.1.q.weight", True),
        ("layers.1", "layers.12.q.weight", False),
        ("layers.1", "sublayers.1.q", False),
        ("layers.1", "layersX1.q", False),
        ("layers.1*", "layers.12.q", True),
        ("layers.[12].*", "layers.2.q", True),
        ("layers.?.q", "layers.2.Q", False),
        ("head", "lm_head.weight", False),
    ],
)
def test_a_pattern_is_whole_components_or_a_glob(pattern, name, yes):
    assert matches(pattern, name) is yes


def test_missing_body_tensor_names_tensor_and_expert(save, tuned, bert):
    name = "encoder.layer.1.output.dense.weight"
    path = rewrite(save(tuned(bert, 1)), lambda tensors: tensors.pop(name))
    with pytest.raises(TwinmergeError, match=f"^b lacks the tensor '{name}' that the base base has"):
        matched(bert, {"a": tuned(bert, 2), "b": path})


def test_unknown_tensor_names_tensor_and_expert(save, tuned, bert):
    path = rewrite(save(tuned(bert, 1)), lambda tensors: tensors.update(extra=torch.ones(3)))
    with pytest.raises(TwinmergeError, match="Tensor 'extra' of b is neither in the base base nor a part of BertModel"):
        matched(bert, {"b": path})
    assert matched(bert, {"b": path}, ["extra"]).heads == {"b": ["extra"]}


def test_other_architecture(build, bert):
    with pytest.raises(TwinmergeError, match="a is a roberta model, the base base is a bert"):
        matched(bert, {"a": build("RobertaModel")})


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("BertForSequenceClassification", "embeddings.word_embeddings.weight"),
        ("BertModel", "embeddings.word_embeddings.weight"),
        ("LlamaForCausalLM", "embed_tokens.weight"),
        ("T5ForConditionalGeneration", "shared.weight"),
    ],
)
def test_other_vocabulary_is_no_head(build, name, tensor):
    with pytest.raises(TwinmergeError, match=rf"Tensor '{tensor}' is \[31, 16\] in a and \[30, 16\] in the base base"):
        matched(build(name), {"a": build(name, vocab_size=31)})


def test_other_width_inside_the_bare_model_is_no_head(build, bert):
    with pytest.raises(
        TwinmergeError, match=r"intermediate_size is 24 \(16 in the base\), which changes 'encoder.layer.0.inter"
    ):
        matched(bert, {"a": build("BertModel", intermediate_size=24)})


def test_part_that_only_the_base_has_is_copied(build, with_body_of):
    base = build("BertForMaskedLM")
    expert = with_body_of(build("BertForSequenceClassification"), base)
    found = matched(base, {"a": expert})
    assert [n for n in found.from_base if n.startswith("cls.")] == found.from_base and len(found.from_base) == 5
    assert found.heads == {"a": [*CLASSIFIER, "pooler.dense.bias", "pooler.dense.weight"]}
    assert found.merged == sorted(base.bert.state_dict())


def test_nothing_in_common(save, bert, tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        save_file({name: torch.ones(3)}, tmp_path / name / "model.safetensors")
    with pytest.raises(TwinmergeError, match="No tensor of the experts has a name and shape that the base base has"):
        matched(str(tmp_path / "a"), {"b": str(tmp_path / "b")})


def test_integers_and_old_buffers_come_from_the_base(save, tuned, bert):
    """embeddings.position_ids was a persistent buffer until transformers 4.31."""

    def age(tensors):
        tensors["embeddings.position_ids"] = torch.arange(16)[None]

    old = {name: rewrite(save(tuned(bert, seed), name), age) for seed, name in enumerate(["base", "a"])}
    found = matched(old["base"], {"a": old["a"]})
    assert found.from_base == ["embeddings.position_ids"] and found.ignored == {"a": []}
    assert found.heads == {"a": []} and found.merged == sorted(bert.state_dict())
    assert matched(bert, {"a": old["a"]}).ignored == {"a": ["embeddings.position_ids"]}


def test_float_buffer_that_the_class_drops(save, build, tuned):
    """Old Llama checkpoints store rotary_emb.inv_freq, in every layer."""
    base = build("LlamaForCausalLM")

    def age(tensors):
        tensors["model.rotary_emb.inv_freq"] = torch.ones(4)

    found = matched(base, {"a": rewrite(save(tuned(base, 1)), age)})
    assert found.ignored == {"a": ["rotary_emb.inv_freq"]} and found.heads == {"a": []}


def test_tied_base_and_untied_expert(build, with_body_of):
    """An output layer of its own may not get lost."""
    base = build("LlamaForCausalLM", tie_word_embeddings=True)
    expert = with_body_of(build("LlamaForCausalLM", tie_word_embeddings=False), base)
    with pytest.raises(
        TwinmergeError, match="Tensor 'lm_head.weight' of a has its own values.* ties it to 'embed_tokens"
    ):
        matched(base, {"a": expert})
    assert matched(base, {"a": expert}, ["lm_head"]).heads == {"a": ["lm_head.weight"]}
    with torch.no_grad():
        expert.lm_head.weight.copy_(expert.model.embed_tokens.weight)
    found = matched(base, {"a": expert})
    assert found.ignored == {"a": ["lm_head.weight"]} and found.heads == {"a": []}


def test_untied_base_and_tied_expert_merge_the_output_layer(build, with_body_of):
    base = build("LlamaForCausalLM", tie_word_embeddings=False)
    expert = with_body_of(build("LlamaForCausalLM", tie_word_embeddings=True), base)
    assert "lm_head.weight" in matched(base, {"a": expert}).merged


def test_tensors_that_no_class_has_are_left_out_where_asked(build, save, tuned, with_body_of):
    """As mergekit leaves them out: a value head, and a bias that the class does not have."""
    base = build("LlamaForCausalLM")

    def add(tensors):
        tensors["v_head.summary.weight"] = torch.ones(1, 16)
        tensors["model.layers.0.self_attn.extra"] = torch.ones(16)

    more = rewrite(save(tuned(base, 1)), add)
    names = ["layers.0.self_attn.extra", "v_head.summary.weight"]
    own, experts = open_model(base, "base"), opened(a=more, b=tuned(base, 2))
    with pytest.raises(TwinmergeError, match=f"{names[0]!r}.* nor a part of LlamaForCausalLM"):
        match(own, experts)
    with pytest.warns(UserWarning, match=f"has {names[0]!r}, {names[1]!r}, which LlamaForCausalLM has not: left out"):
        found = match(own, experts, strangers=True)
    assert found.ignored == {"a": names, "b": []} and not set(names) & {*found.merged, *found.from_base}
    assert found.heads == {"a": [], "b": []}
