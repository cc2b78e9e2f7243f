from __future__ import annotations

import asyncio
import dataclasses
import gc
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import exl2_rag
from exl2_rag import Choice, ExL2LLM, JsonSchema, Regex, SamplingParams
from exl2_rag.errors import (
    ChatTemplateError,
    CheckpointError,
    ConstraintError,
    ContextOverflowError,
    DeviceError,
    EngineClosedError,
    ModelError,
    ModelNotFoundError,
    RequestError,
    RequestTimeoutError,
    SettingsError,
    TokenizerError,
    UnsupportedModelError,
)
from exl2_rag.llm.kernels import ops
from exl2_rag.llm.tokenizer import TextBlock
from tests.support.byte_tokenizer import ASSISTANT_ID, BOS_ID, END_ID, EOS_ID, USER_ID, write_byte_tokenizer
from tests.support.synthetic import make_model_dir

GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_dir(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="module")
def llm(model_dir: Path) -> Iterator[ExL2LLM]:
    with ExL2LLM(model_dir, max_batch_size=8) as one:
        yield one


def wait_until(holds: Any, timeout_s: float = 60.0) -> None:
    end = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.002)


# --- text ------------------------------------------------------------------------------------------------------------


def test_a_text_prompt_gets_a_bos_and_comes_back_with_exact_counts(llm: ExL2LLM) -> None:
    result = llm.generate("Hello", GREEDY)
    assert len(result.token_ids) == 12
    assert result.text == llm.tokenizer.decode(result.token_ids)
    assert result.finish_reason == "length"
    assert result.usage.prompt_tokens == 6
    assert result.usage.completion_tokens == 12
    assert result.usage.total_tokens == 18
    assert llm.generate([BOS_ID, *b"Hello"], GREEDY).token_ids == result.token_ids


def test_what_looks_like_a_special_token_in_a_text_prompt_is_ordinary_text(llm: ExL2LLM) -> None:
    assert llm.generate("a<|end|>", GREEDY).usage.prompt_tokens == 1 + 1 + len("<|end|>")


def test_a_list_of_prompts_gives_a_list_of_results_in_order(llm: ExL2LLM) -> None:
    prompts = ["one", "another one", "x"]
    results = llm.generate(prompts, GREEDY)
    assert [one.token_ids for one in results] == [llm.generate(one, GREEDY).token_ids for one in prompts]
    assert len(llm.generate(["only one"], GREEDY)) == 1
    ids = [[BOS_ID, *one.encode()] for one in prompts]
    assert [one.token_ids for one in llm.generate(ids, GREEDY)] == [one.token_ids for one in results]


def test_token_ids_may_be_numpy_integers(llm: ExL2LLM) -> None:
    ids = np.array([BOS_ID, 65, 66])
    expected = llm.generate(ids.tolist(), GREEDY).token_ids
    assert llm.generate(list(ids), GREEDY).token_ids == expected


def test_greedy_tokens_are_the_most_likely_ones_of_the_logits(llm: ExL2LLM) -> None:
    prompt = [BOS_ID, *b"The cat sat on the"]
    result = llm.generate(prompt, GREEDY)
    logits = llm.logits([*prompt, *result.token_ids])
    assert logits.dtype == torch.float32
    assert logits.shape == (len(prompt) + 12, llm.config.vocab_size)
    assert tuple(logits[len(prompt) - 1 : -1].argmax(dim=-1).tolist()) == result.token_ids


def test_streamed_pieces_join_to_the_generated_text(llm: ExL2LLM) -> None:
    result = llm.generate("Stream this", GREEDY)
    pieces = list(llm.stream("Stream this", GREEDY))
    assert "".join(piece.text for piece in pieces) == result.text
    assert tuple(token for piece in pieces for token in piece.token_ids) == result.token_ids
    assert [piece.usage for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].finish_reason == "length"


def test_no_piece_ever_holds_a_broken_character(llm: ExL2LLM) -> None:
    text = "żółć – 漢字 🙂 "
    constraint = Choice([text * 2, text * 2 + "!"])
    pieces = list(llm.stream("Say it:", SamplingParams(max_tokens=200, temperature=0), constraint=constraint))
    joined = "".join(piece.text for piece in pieces)
    assert joined in (text * 2, text * 2 + "!")
    assert not any("\ufffd" in piece.text for piece in pieces)


def test_stop_strings_are_held_back_across_tokens(llm: ExL2LLM) -> None:
    constraint = Regex("one END two (a|b)*")
    sampling = SamplingParams(max_tokens=40, temperature=0, stop=("END",))
    pieces = list(llm.stream("x", sampling, constraint=constraint))
    assert "".join(piece.text for piece in pieces) == "one "
    assert pieces[-1].finish_reason == "stop"


def test_every_end_of_sequence_id_of_the_model_ends_a_text(llm: ExL2LLM) -> None:
    sampling = SamplingParams(max_tokens=60, temperature=5.0, seed=5)
    ended = [one for one in llm.generate([f"{n}" for n in range(120)], sampling) if one.finish_reason == "stop"]
    assert {one.token_ids[-1] for one in ended} == {EOS_ID, END_ID}
    for one in ended:
        assert EOS_ID not in one.token_ids[:-1]
        assert END_ID not in one.token_ids[:-1]


def test_a_seed_gives_the_same_text_alone_and_in_a_batch(llm: ExL2LLM) -> None:
    sampling = SamplingParams(max_tokens=20, temperature=1.5, top_p=0.95, seed=3)
    alone = llm.generate("seeded", sampling)
    batch = llm.generate(["other", "seeded", "a third, rather longer prompt"], sampling)
    assert batch[1].token_ids == alone.token_ids
    assert llm.generate("seeded", SamplingParams(max_tokens=20, temperature=1.5, seed=4)).token_ids != alone.token_ids


def test_several_continuations_of_a_prompt_come_as_choices(llm: ExL2LLM) -> None:
    how = SamplingParams(max_tokens=6, temperature=1.5, seed=3, ignore_eos=True)
    several = dataclasses.replace(how, n=3)
    result = llm.generate("one prompt", several)
    assert [one.index for one in result.choices] == [0, 1, 2]
    assert result.choices[0] is result
    assert result.token_ids == llm.generate("one prompt", how).token_ids
    assert len({one.token_ids for one in result.choices}) == 3
    assert result.total_usage.completion_tokens == 18
    assert result.total_usage.prompt_tokens == result.usage.prompt_tokens
    streamed: dict[int, str] = {0: "", 1: "", 2: ""}
    for piece in llm.stream("one prompt", several):
        streamed[piece.index] += piece.text
    assert [streamed[index] for index in range(3)] == [one.text for one in result.choices]
    batch = llm.generate(["one prompt", "another"], several)
    assert [len(one.choices) for one in batch] == [3, 3]
    assert batch[0].choices[2].token_ids == result.choices[2].token_ids


def test_a_request_takes_a_priority_and_a_timeout(llm: ExL2LLM) -> None:
    assert llm.generate("text", GREEDY, priority=3, timeout_s=60).finish_reason == "length"
    with pytest.raises(RequestTimeoutError, match="timeout_s of 1e-06 s"):
        llm.generate("text", GREEDY, timeout_s=1e-6)
    with pytest.raises(RequestError, match="priority must be a whole number"):
        llm.generate("text", GREEDY, priority=1.5)  # type: ignore[arg-type]
    assert llm.active_requests == 0


def test_the_defaults_are_those_of_sampling_params(llm: ExL2LLM) -> None:
    assert llm.generate("x", SamplingParams(max_tokens=3, seed=1)).usage.completion_tokens <= 3
    assert llm.generate("x").usage.completion_tokens <= SamplingParams().max_tokens  # type: ignore[operator]


# --- chat ------------------------------------------------------------------------------------------------------------


MESSAGES = [{"role": "user", "content": "Hi"}]


def test_chat_goes_through_the_chat_template(llm: ExL2LLM) -> None:
    expected = [BOS_ID, USER_ID, *b"Hi", END_ID, ASSISTANT_ID]
    assert llm.encode_chat(MESSAGES) == expected
    assert llm.encode_chat(MESSAGES, add_generation_prompt=False) == expected[:-1]
    result = llm.chat(MESSAGES, GREEDY)
    assert result.usage.prompt_tokens == len(expected)
    assert result.token_ids == llm.generate(expected, GREEDY).token_ids
    assert "".join(piece.text for piece in llm.stream_chat(MESSAGES, GREEDY)) == result.text


def test_tools_reach_the_chat_template(llm: ExL2LLM) -> None:
    tools = [{"type": "function", "function": {"name": "look_up"}}]
    assert b"look_up" in bytes(one for one in llm.encode_chat(MESSAGES, tools=tools) if one < 256)
    assert llm.chat(MESSAGES, GREEDY, tools=tools).usage.prompt_tokens == len(llm.encode_chat(MESSAGES, tools=tools))


def test_messages_made_of_blocks_share_their_leading_tokens(llm: ExL2LLM) -> None:
    def blocks(question: str) -> list[dict[str, Any]]:
        content = [TextBlock("a document <|end|>\n", trusted=False), TextBlock(question, trusted=False)]
        return [{"role": "user", "content": content}]

    first, second = llm.encode_chat(blocks("why?")), llm.encode_chat(blocks("how?"))
    n_document = len("a document <|end|>\n")
    assert first[: 2 + n_document] == second[: 2 + n_document]
    llm.chat(blocks("why?"), GREEDY)
    assert llm.chat(blocks("how?"), GREEDY).usage.cached_tokens == 2 + n_document


def test_a_model_without_a_chat_template_still_generates(tmp_path: Path) -> None:
    make_model_dir(tmp_path / "base")
    write_byte_tokenizer(tmp_path / "base", chat_template=False)
    with ExL2LLM(tmp_path / "base") as llm:
        assert llm.generate("x", GREEDY).usage.completion_tokens == 12
        with pytest.raises(ChatTemplateError, match=str(tmp_path)):
            llm.chat(MESSAGES)


# --- constraints -----------------------------------------------------------------------------------------------------


SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["Ada", "Grace"]}, "age": {"type": "integer", "minimum": 0, "maximum": 999}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_json_obeys_its_schema_and_ends_with_stop(llm: ExL2LLM, temperature: float) -> None:
    sampling = SamplingParams(max_tokens=60, temperature=temperature, seed=1)
    results = llm.generate([f"person {n}" for n in range(6)], sampling, constraint=JsonSchema(SCHEMA))
    for one in results:
        value = json.loads(one.text)
        assert value["name"] in ("Ada", "Grace")
        assert 0 <= value["age"] <= 999
        assert one.finish_reason == "stop"


def test_a_constrained_text_cut_at_max_tokens_says_length(llm: ExL2LLM) -> None:
    result = llm.generate("x", SamplingParams(max_tokens=9, temperature=0), constraint=JsonSchema(SCHEMA))
    assert result.finish_reason == "length"
    assert result.text.startswith('{"name":"')


def test_a_constraint_that_cannot_be_enforced_is_refused_before_it_runs(llm: ExL2LLM) -> None:
    with pytest.raises(ConstraintError):
        llm.generate("x", constraint=JsonSchema({"type": "object", "unevaluatedProperties": {"x-unknown": 1}}))
    with pytest.raises(ConstraintError):
        llm.stream("x", constraint=Regex("(unclosed"))
    assert llm.active_requests == 0


# --- requests that cannot run ----------------------------------------------------------------------------------------


def test_a_prompt_over_max_seq_len_raises_before_it_takes_a_slot(model_dir: Path) -> None:
    with ExL2LLM(model_dir, max_seq_len=64) as llm:
        assert llm.max_seq_len == 64
        for call in (llm.generate, llm.stream):
            with pytest.raises(ContextOverflowError, match=r"101 tokens, the limit is 64 \(max_seq_len\)") as caught:
                call("x" * 100)
            assert (caught.value.prompt_tokens, caught.value.limit_tokens) == (101, 64)
        with pytest.raises(ContextOverflowError, match="101"):
            llm.generate(["short", "x" * 100])
        assert llm.active_requests == 0
        assert llm.generate("x" * 62, GREEDY).usage.completion_tokens == 1


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([], "got an empty list"),
        ([1, 320], "from 0 to 319, got 320"),
        ([-1], "got -1"),
        ([1, "two"], "expected a text"),
        ([1, 2.5], "expected a text"),
        ([["a"]], "expected a text"),
        ({"role": "user"}, "expected a"),
        (None, "expected a"),
        (7, "expected a"),
        (b"bytes", "expected a text"),
    ],
)
def test_what_is_no_prompt_is_refused(llm: ExL2LLM, prompt: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        llm.generate(prompt, GREEDY)


# --- cancelling, sharing, closing ------------------------------------------------------------------------------------


def test_closing_a_stream_frees_its_slot(llm: ExL2LLM) -> None:
    stream = llm.stream("a long one", SamplingParams(max_tokens=400, temperature=0, ignore_eos=True))
    next(stream)
    assert llm.active_requests == 1
    stream.close()
    assert llm.active_requests == 0
    wait_until(lambda: llm.cache_report().running_pages == 0)


def test_eight_threads_use_one_engine(llm: ExL2LLM) -> None:
    prompts = [f"thread {n % 5} " * (n % 7 + 1) for n in range(24)]
    expected = [llm.generate(one, GREEDY).token_ids for one in prompts]

    def ask(n: int) -> tuple[int, ...]:
        if n % 2:
            return tuple(token for piece in llm.stream(prompts[n], GREEDY) for token in piece.token_ids)
        return llm.generate(prompts[n], GREEDY).token_ids

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(24))) == expected
    assert llm.active_requests == 0


async def test_the_async_face_gives_what_the_sync_one_gives(llm: ExL2LLM) -> None:
    expected = llm.generate("async", GREEDY)
    assert (await llm.agenerate("async", GREEDY)).token_ids == expected.token_ids
    pieces = [piece async for piece in llm.astream("async", GREEDY)]
    assert "".join(piece.text for piece in pieces) == expected.text
    assert [one.text for one in await llm.agenerate(["async", "async"], GREEDY)] == [expected.text] * 2
    chat = llm.chat(MESSAGES, GREEDY)
    assert (await llm.achat(MESSAGES, GREEDY)).token_ids == chat.token_ids
    assert "".join([piece.text async for piece in llm.astream_chat(MESSAGES, GREEDY)]) == chat.text


def test_several_event_loops_use_one_engine_one_after_another(llm: ExL2LLM) -> None:
    expected = llm.generate("loops", GREEDY).token_ids
    for _ in range(3):
        assert asyncio.run(llm.agenerate("loops", GREEDY)).token_ids == expected


async def test_cancelling_a_task_frees_its_slots(llm: ExL2LLM) -> None:
    forever = SamplingParams(max_tokens=400, temperature=0, ignore_eos=True)
    for start in (
        lambda: llm.agenerate("cancel me", forever),
        lambda: llm.agenerate(["cancel me", "and me"], forever),
        lambda: llm.achat(MESSAGES, forever),
    ):
        task = asyncio.ensure_future(start())
        while not llm.active_requests:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert llm.active_requests == 0
    wait_until(lambda: llm.cache_report().running_pages == 0)


async def test_leaving_an_async_stream_frees_its_slot(llm: ExL2LLM) -> None:
    forever = SamplingParams(max_tokens=400, temperature=0, ignore_eos=True)
    for stream in (llm.astream("leave", forever), llm.astream_chat(MESSAGES, forever)):
        async for _ in stream:
            break
        await stream.aclose()
        assert llm.active_requests == 0


async def test_async_errors_reach_the_caller(llm: ExL2LLM) -> None:
    with pytest.raises(ContextOverflowError):
        await llm.agenerate("x" * 1000)
    with pytest.raises(ContextOverflowError):
        await anext(llm.astream("x" * 1000))
    with pytest.raises(ConstraintError):
        await llm.achat(MESSAGES, constraint=Regex("("))


def test_a_closed_engine_says_so(model_dir: Path) -> None:
    llm = ExL2LLM(model_dir)
    stream = llm.stream("x", SamplingParams(max_tokens=400, temperature=0, ignore_eos=True))
    next(stream)
    assert not llm.closed
    llm.close()
    llm.close()
    assert llm.closed
    with pytest.raises(EngineClosedError):
        list(stream)
    with pytest.raises(EngineClosedError, match="make a new ExL2LLM"):
        llm.generate("x")
    with pytest.raises(EngineClosedError):
        llm.cache_report()


def test_an_engine_that_nobody_holds_is_closed_but_not_under_a_stream(model_dir: Path) -> None:
    llm = ExL2LLM(model_dir)
    thread = llm._thread
    stream = llm.stream("x", GREEDY)
    del llm
    gc.collect()
    assert not thread.is_closed
    assert len(list(stream)) > 0
    del stream
    gc.collect()
    wait_until(lambda: thread.is_closed)


def test_an_interpreter_that_ends_with_a_request_in_progress_ends_quietly(model_dir: Path) -> None:
    code = (
        "import sys\n"
        "from exl2_rag import ExL2LLM, SamplingParams\n"
        "llm = ExL2LLM(sys.argv[1])\n"
        "stream = llm.stream('x', SamplingParams(max_tokens=450, temperature=0, ignore_eos=True))\n"
        "print(len(next(stream).token_ids))\n"
    )
    # Named, so that a machine without a compiler gives no notice about it.
    environment = os.environ | {"EXL2_RAG_KERNELS": "native" if ops.native_available() else "reference"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(model_dir)],
        check=False,
        capture_output=True,
        text=True,
        timeout=250,
        env=environment,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout) >= 1


# --- the cache -------------------------------------------------------------------------------------------------------


def test_a_warmed_chat_is_found_by_the_next_one(llm: ExL2LLM) -> None:
    system = [{"role": "system", "content": "You are a patient teacher of mathematics."}]
    warmed = llm.warm(system)
    assert warmed.cached_tokens < warmed.prompt_tokens
    again = llm.warm(system)
    assert again.cached_tokens == again.prompt_tokens - 1
    asked = llm.chat([*system, {"role": "user", "content": "Why?"}], GREEDY)
    assert asked.usage.cached_tokens == warmed.prompt_tokens
    assert llm.warm("some text").prompt_tokens == 10
    assert llm.warm([BOS_ID, 1, 2]).prompt_tokens == 3


def test_a_pin_keeps_its_pages_until_it_is_released(model_dir: Path) -> None:
    with ExL2LLM(model_dir, cache_tokens=160, page_size=16, max_batch_size=2) as llm:
        pin = llm.pin("p" * 49)
        assert pin.n_tokens == 50
        assert llm.cache_report().pinned_pages == 4
        for n in range(8):
            llm.generate(str(n) * 80, GREEDY)
        assert llm.generate("p" * 49 + "!", GREEDY).usage.cached_tokens == 50
        pin.release()
        pin.release()
        assert llm.cache_report().pinned_pages == 0
        with llm.pin("q" * 20):
            assert llm.cache_report().pinned_pages == 2
        assert llm.cache_report().pinned_pages == 0
        late = llm.pin("late")
    late.release()


def test_the_cache_report_counts_every_page_once(llm: ExL2LLM) -> None:
    report = llm.cache_report()
    assert (
        report.free_pages + report.cached_pages + report.running_pages + report.pinned_pages
        == report.pages
        == llm.engine_config.n_pages
    )
    assert report.size_bytes > 0
    assert 0 < report.cached_tokens < report.prompt_tokens


# --- evaluation ------------------------------------------------------------------------------------------------------


def test_logits_do_not_depend_on_what_is_cached_or_on_the_slices(model_dir: Path) -> None:
    tokens = [BOS_ID, *b"logits must not depend on slices" * 6]
    with ExL2LLM(model_dir) as whole, ExL2LLM(model_dir, max_batch_size=1, max_batched_tokens=17) as sliced:
        expected = whole.logits(tokens)
        whole.generate(tokens, GREEDY)
        assert torch.equal(whole.logits(tokens), expected)
        assert torch.equal(sliced.logits(tokens), expected)


def test_scores_are_the_log_probabilities_of_the_continuation(llm: ExL2LLM) -> None:
    scores = llm.score("Once upon", " a time")
    tokens = [BOS_ID, *b"Once upon a time"]
    expected = llm.logits(tokens).double().log_softmax(dim=-1)
    places = range(len(tokens) - 7, len(tokens))
    assert scores == pytest.approx([float(expected[n - 1, tokens[n]]) for n in places], abs=1e-6)
    assert llm.score([BOS_ID, *b"Once upon"], list(b" a time")) == scores
    with pytest.raises(RequestError, match="continuation of at least one token"):
        llm.score("x", "")


# --- loading ---------------------------------------------------------------------------------------------------------


def test_the_model_says_what_it_is(llm: ExL2LLM, model_dir: Path) -> None:
    assert llm.model_name == "tiny-llama"
    assert llm.model_dir == model_dir
    assert llm.config.architecture == "LlamaForCausalLM"
    assert repr(llm) == f"ExL2LLM({str(model_dir)!r})"
    assert llm.engine_config.cache_dtype == "fp32"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"precision": "best"}, "precision must be"),
        ({"kv_store_bytes": 10**9}, "give kv_store a directory"),
        ({"kv_ram_bytes": -1}, "kv_ram_bytes must be 0"),
        ({"kv_ram_bytes": 5}, "kv_ram_bytes must hold at least one page"),
        (
            {"draft_model": "somewhere"},
            "draft_model must be 'prompt-lookup' or the directory of a model, got 'somewhere'",
        ),
        ({"max_seq_len": 100_000}, "max_seq_len must be from 2 to the model's 512"),
    ],
)
def test_an_option_of_a_later_version_is_refused_by_name(model_dir: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        ExL2LLM(model_dir, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card, so nothing is refused")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_card_that_is_not_there_is_an_error_that_says_what_to_do(model_dir: Path, device: str) -> None:
    with pytest.raises(DeviceError, match=r"no NVIDIA driver.*device='cpu'"):
        ExL2LLM(model_dir, device=device)


def test_an_unknown_option_is_refused(model_dir: Path) -> None:
    with pytest.raises(TypeError, match="no_such_option"):
        ExL2LLM(model_dir, no_such_option=1)  # type: ignore[call-arg]


def remove_config(model_dir: Path) -> None:
    (model_dir / "config.json").unlink()


def break_config(model_dir: Path) -> None:
    (model_dir / "config.json").write_text("{")


def change_architecture(model_dir: Path) -> None:
    path = model_dir / "config.json"
    path.write_text(path.read_text().replace("LlamaForCausalLM", "NovelForCausalLM"))


def remove_tensors(model_dir: Path) -> None:
    (model_dir / "model.safetensors").unlink()


def truncate_tensors(model_dir: Path) -> None:
    path = model_dir / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def duplicate_tensors(model_dir: Path) -> None:
    shutil.copy(model_dir / "model.safetensors", model_dir / "again.safetensors")


def remove_tokenizer(model_dir: Path) -> None:
    (model_dir / "tokenizer.json").unlink()


def break_tokenizer(model_dir: Path) -> None:
    (model_dir / "tokenizer.json").write_text("[]")


@pytest.mark.parametrize(
    ("damage", "kind"),
    [
        (remove_config, ModelNotFoundError),
        (break_config, ModelError),
        (change_architecture, UnsupportedModelError),
        (remove_tensors, ModelNotFoundError),
        (truncate_tensors, CheckpointError),
        (duplicate_tensors, CheckpointError),
        (remove_tokenizer, TokenizerError),
        (break_tokenizer, TokenizerError),
    ],
)
def test_a_broken_model_directory_is_named_in_the_error(
    model_dir: Path, tmp_path: Path, damage: Any, kind: type[ModelError]
) -> None:
    broken = tmp_path / "broken-model"
    shutil.copytree(model_dir, broken)
    damage(broken)
    with pytest.raises(kind, match="broken-model"):
        ExL2LLM(broken)


def test_a_missing_directory_and_a_file_are_no_models(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", tmp_path / "file"):
        if path.name == "file":
            path.write_text("")
        with pytest.raises(ModelNotFoundError, match=path.name):
            ExL2LLM(str(path))


def test_the_package_exports_what_it_promises() -> None:
    assert exl2_rag.ExL2LLM is ExL2LLM
    assert set(exl2_rag.__all__) <= set(dir(exl2_rag))
    assert exl2_rag.__version__
    with pytest.raises(AttributeError, match="it exports"):
        _ = exl2_rag.NoSuchName
