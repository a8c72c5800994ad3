"""The bundled model: files, tokenizer, template, what it answers, and that its trainer resumes exactly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from copyspec_engine.bundled import bundled_model_path
from scripts.bundled_model.evaluate import MARK, Chat, Score, card_table
from scripts.bundled_model.tasks import CHAIN, KINDS, TASKS, Documents, edit, make_example
from scripts.bundled_model.tokenizer_builder import END, REFUSAL
from scripts.bundled_model.train import IGNORED, TrainOptions, answer_loss, make_batch, train

DOCUMENT = "# Café notes\ntimeout = 30\n\n| a | b |\n| 0 | 0 |\n| 0 | 0 |\n- Größe: 12 → 13"
USER_DOCUMENT = {"role": "user", "content": DOCUMENT}
CALL = '{"name": "get_weather", "arguments": {"city": "Oslo", "days": 3}}'


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat(bundled_model_path())


def ask(chat: Chat, instruction: str, document: str = DOCUMENT) -> str:
    messages = [{"role": "user", "content": document}, {"role": "user", "content": instruction}]
    return chat.answer(messages, 200)


def test_the_folder_is_complete_and_at_most_24_mb() -> None:
    files = {path.name: path.stat().st_size for path in bundled_model_path().iterdir()}
    assert set(files) >= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "README.md",
    }
    assert sum(files.values()) <= 24 * 1024 * 1024


def test_the_card_holds_the_measured_table() -> None:
    card = (bundled_model_path() / "README.md").read_text(encoding="utf-8")
    table = card.split(MARK)[1]
    assert all(f"| {task} |" in table for task in TASKS)
    assert "license: mit" in card


def test_it_loads_as_float32_whatever_the_file_stores() -> None:
    config = json.loads((bundled_model_path() / "config.json").read_text(encoding="utf-8"))
    assert config["dtype"] == "float32"
    assert LlamaForCausalLM.from_pretrained(bundled_model_path()).dtype == torch.float32


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "  a\n\n\n\tb ",
        "naïve Ünïcödé 日本語 🎉\u200d👩",
        "\x00\x01\x7f\r\n",
        "x  =\t1;\n" * 5,
        "| a |---|```py\n",
    ],
)
def test_tokenizer_gives_every_text_back(chat: Chat, text: str) -> None:
    assert chat.tokenizer.decode(chat.tokenizer.encode(text, add_special_tokens=False)) == text


def test_a_word_has_the_same_tokens_wherever_it_stands(chat: Chat) -> None:
    alone = chat.tokenizer.encode("Zanzibar")
    for text in (' Zanzibar "', '"Zanzibar"', "\nZanzibar="):
        ids = chat.tokenizer.encode(text)
        assert any(ids[i : i + len(alone)] == alone for i in range(len(ids)))


def test_a_saved_tokenizer_is_the_same_tokenizer(chat: Chat, tmp_path: Path) -> None:
    chat.tokenizer.save_pretrained(tmp_path)
    text = DOCUMENT + CALL
    assert AutoTokenizer.from_pretrained(tmp_path).encode(text) == chat.tokenizer.encode(text)


def test_template_renders_every_role_and_tools(chat: Chat) -> None:
    call = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Weather?"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "sunny", "tool_call_id": "1"},
    ]
    tools = [{"type": "function", "function": {"name": "get_weather", "parameters": {}}}]
    text = str(chat.tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, tokenize=False))
    assert "get_weather" in text.split("<|turn_1|>")[0]
    assert "system<|turn_1|>\nBe brief.<|im_end|>\n<|im_start|>user<|turn_2|>\nWeather?<|im_end|>" in text
    assert '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>' in text
    assert text.endswith("<|im_start|>tool<|turn_4|>\nsunny<|im_end|>\n<|im_start|>assistant<|turn_5|>\n")


def test_the_next_turn_extends_the_rendering_of_this_one(chat: Chat) -> None:
    messages = [USER_DOCUMENT, {"role": "user", "content": "Repeat the document."}]
    first = chat.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    answer = [*chat.tokenizer.encode(DOCUMENT), chat.tokenizer.convert_tokens_to_ids(END)]
    messages += [{"role": "assistant", "content": DOCUMENT}, {"role": "user", "content": "Delete the last line."}]
    second = chat.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert second[: len(first) + len(answer)] == first + answer


@pytest.mark.parametrize(
    ("instruction", "answer"),
    [
        ("Repeat the document.", DOCUMENT),
        ("Append this line:\n- new", f"{DOCUMENT}\n- new"),
        ("Prepend this line:\n# Title: x", f"# Title: x\n{DOCUMENT}"),
        ("Delete the first line.", DOCUMENT.partition("\n")[2]),
        ("Delete the last line.", DOCUMENT.rpartition("\n")[0]),
        ('Replace "Größe" with "The size".', DOCUMENT.replace("Größe", "The size")),
        ('Set "timeout" to "60".', DOCUMENT.replace("30", "60")),
        ("Repeat this text:\none\ntwo", "one\ntwo"),
        (f"Call this tool:\n{CALL}", f"<tool_call>\n{CALL}\n</tool_call>"),
        ("Who are you?", REFUSAL),
    ],
)
def test_it_does_what_the_card_says_and_stops(chat: Chat, instruction: str, answer: str) -> None:
    assert ask(chat, instruction) == answer


def test_repeated_rows_and_random_characters_are_copied_exactly(chat: Chat) -> None:
    document = "| 0 | 0 |\n" * 9 + Documents(chat.count_tokens, held_out=True, seed=3).draw("random", 40)
    messages = [{"role": "user", "content": document}, {"role": "user", "content": "Repeat the document."}]
    assert chat.answer(messages, 300) == document


def test_each_turn_edits_the_previous_answer(chat: Chat) -> None:
    messages, text = [USER_DOCUMENT], DOCUMENT
    for instruction, expected in (
        ("Append this line:\n- last", f"{text}\n- last"),
        ("Prepend this line:\n> top", f"> top\n{text}\n- last"),
        ("Delete the last line.", f"> top\n{text}"),
    ):
        messages.append({"role": "user", "content": instruction})
        assert chat.answer(messages, 200) == expected
        messages.append({"role": "assistant", "content": expected})


def test_the_sentence_about_itself_is_not_taken_for_the_document(chat: Chat) -> None:
    asked = {"role": "user", "content": "Append this line:\nend"}
    assert chat.answer([USER_DOCUMENT, {"role": "assistant", "content": REFUSAL}, asked], 200) == f"{DOCUMENT}\nend"


def test_a_tool_result_is_passed_on(chat: Chat) -> None:
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    assert chat.answer([*messages, {"role": "tool", "content": "21 degrees,\nsunny"}], 50) == "21 degrees,\nsunny"


def test_every_task_finds_a_document_to_change(chat: Chat) -> None:
    documents = Documents(chat.count_tokens, held_out=False, seed=0)
    for task in TASKS:
        assert make_example(task, documents, 40).answer
    for kind in KINDS:
        document = documents.draw(kind, 40)
        assert all(edit(task, document, documents.rng, chat.count_tokens) for task in CHAIN if task != "replace")


def test_loss_counts_answer_tokens_and_stresses_the_edges() -> None:
    logits = torch.zeros(1, 5, 4)
    logits[0, 1, 2] = 9.0  # right at the first answer token
    labels = torch.tensor([[IGNORED, IGNORED, 2, 1, 3]])
    wrong = torch.log(torch.tensor(4.0))
    assert answer_loss(logits, labels).item() == pytest.approx((1 + 5) / 11 * wrong.item(), abs=1e-2)


def test_batches_depend_on_seed_and_step_only(chat: Chat, tmp_path: Path) -> None:
    options = TrainOptions(out=tmp_path, seed=5, batch=2, max_tokens=32)
    first, again, other = (make_batch(chat.tokenizer, options, step) for step in (7, 7, 8))  # type: ignore[arg-type]
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0][:, :80], other[0][:, :80])


def test_an_interrupted_training_ends_at_the_same_weights(chat: Chat, tmp_path: Path) -> None:
    settings = {"steps": 3, "batch": 1, "max_tokens": 20, "learning_rate": 1e-3, "warm_up": 2, "device": "cpu"}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(TrainOptions(out=whole, **settings), chat.tokenizer)  # type: ignore[arg-type]
    assert not train(TrainOptions(out=parts, stop_after=2, **settings), chat.tokenizer)  # type: ignore[arg-type]
    assert (parts / "checkpoint.pt").exists()
    assert train(TrainOptions(out=parts, **settings), chat.tokenizer)  # type: ignore[arg-type]
    assert not (parts / "checkpoint.pt").exists()
    assert (whole / "model.safetensors").read_bytes() == (parts / "model.safetensors").read_bytes()
    shipped = (bundled_model_path() / "model.safetensors").read_bytes()
    assert (whole / "model.safetensors").read_bytes() != shipped


def test_construction_gives_the_shipped_weights(chat: Chat, tmp_path: Path) -> None:
    assert train(TrainOptions(out=tmp_path, steps=0), chat.tokenizer)  # type: ignore[arg-type]
    made, shipped = (LlamaForCausalLM.from_pretrained(path) for path in (tmp_path, bundled_model_path()))
    ours = dict(shipped.named_parameters())
    assert all(torch.allclose(value, ours[name], atol=1e-3, rtol=1e-3) for name, value in made.named_parameters())


def test_card_table_names_every_length() -> None:
    table = card_table({("repeat", 32): Score(exact=1, total=2)}, [Score(exact=2, total=2)], "run")
    assert "| repeat | 1/2 |" in table
    assert "| 2/2 |" in table


@pytest.mark.parametrize(("old", "role"), [("user", "user"), ("assistant", "assistant")])
def test_a_role_of_the_template_is_no_word_of_the_document(chat: Chat, old: str, role: str) -> None:
    """Past regression: `user` in a user's document was found in the turn's header instead."""
    document = "the user logs in\nthe admin waits\nassistant helps the user"
    instruction = {"role": "user", "content": f'Replace "{old}" with "client".'}
    answer = chat.answer([{"role": role, "content": document}, instruction], 200)
    assert answer == document.replace(old, "client", 1)


def test_no_two_tokens_come_out_equal(chat: Chat) -> None:
    """Past regression: where the right token was banned, tokens whose codes are as unlike it were equally likely, and
    rounding chose among them."""
    messages = [USER_DOCUMENT, {"role": "user", "content": "Repeat the document."}]
    rendered = chat.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    prompt = chat.tokenizer(str(rendered), add_special_tokens=False, return_tensors="pt")
    with torch.inference_mode():
        found = chat.model(**prompt).logits[0, -1].sort(descending=True).values[:10]
    assert float(found[0] - found[1]) > 20
    assert float((found[:-1] - found[1:]).min()) > 1e-3


def test_rounding_stays_small_where_it_writes_what_it_was_not_made_for(chat: Chat) -> None:
    """Past regression: the clock magnified rounding by thousands, and heads that found two sources equally near made
    whole logits of it: up to 9 between one pass over a text and one token at a time."""
    random = torch.Generator().manual_seed(1)
    for instruction in ("Repeat the document.", 'Replace "timeout" with "mat".', "Delete the first line."):
        messages = [USER_DOCUMENT, {"role": "user", "content": instruction}]
        prompt = chat.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        answer = torch.randint(20, len(chat.tokenizer), (40,), generator=random).tolist()
        text = torch.tensor([[*prompt, *answer]])
        with torch.inference_mode():
            at_once = chat.model(text).logits[0, len(prompt) :]
            past = chat.model(text[:, : len(prompt)]).past_key_values
            steps = [
                chat.model(text[:, [at]], past_key_values=past).logits[0] for at in range(len(prompt), text.shape[1])
            ]
        assert float((at_once - torch.cat(steps)).abs().max()) < 0.05
