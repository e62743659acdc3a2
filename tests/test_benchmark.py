"""The benchmark's parts on tiny sizes: rows, what is counted, what is kept, and whole models end to end."""
import importlib.util

import pytest
import torch

from tests import benchmark
from tests.benchmark import FEW, TOO_LARGE, Traffic

CPU = torch.device("cpu")
THERE = all(map(importlib.util.find_spec, ("peft", "transformers")))
TINY = {
    "tiny-roberta": benchmark.Job({"model_type": "roberta", "vocab_size": 60, "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16,
                                   "intermediate_size": 24, "max_position_embeddings": 20, "type_vocab_size": 1, "pad_token_id": 1},
                                  their_targets=("query", "value")),
    "tiny-gpt2": benchmark.Job({"model_type": "gpt2", "vocab_size": 60, "n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 16},
                               their_targets=("c_attn",)),
    "tiny-llama": benchmark.Job({"model_type": "llama", "vocab_size": 60, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 16,
                                 "intermediate_size": 24, "max_position_embeddings": 16, "num_key_value_heads": 2, "tie_word_embeddings": False},
                                benchmark.LLAMA_TARGETS, benchmark.LLAMA_TARGETS),
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(benchmark, "JOBS", {**benchmark.JOBS, **TINY})
    monkeypatch.setattr(benchmark, "WARM", 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on sizes this small threads only wait for each other
    yield
    torch.set_num_threads(threads)


def row(shown, name):
    """The cells of the first line that begins with `name`."""
    line = next(line for line in shown.splitlines() if line.startswith(f"| {name} "))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_command_prints_every_row_and_how_time_grows(capsys):
    benchmark.main(["--shapes=24x16", "--tokens=8,12", "--rank=2", "--rounds=1", "--device=cpu", "--dtype=bfloat16"])
    shown = capsys.readouterr().out
    first, *rest = shown.splitlines()
    assert "threads" in first and torch.__version__ in first and "bfloat16" in first
    names = [name for name in benchmark.PASSES if "peft" not in name or importlib.util.find_spec("peft")]
    for name in ["three products", *names]:
        assert shown.count(f"| {name} ") == 2, "one a table"
        assert all(float(cell) > 0 for cell in row(shown, name)[1:4]), "forward, backward and total milliseconds"
    for rows in "\n".join(rest).split("\n\n"):
        assert len({len(line) for line in rows.splitlines() if line.startswith("|")}) <= 1, "columns stand under each other"
    assert "ps per token and weight" in rest[-6] and all(float(cell) > 0 for cell in rest[-1].strip("|").split("|")[1:])


@pytest.mark.parametrize("argument", ["--size=512", "--shapes", "--batch=8x64", "--tokens=x", "--shapes=512", "--rounds=0", "--dtype=float16"])
def test_what_is_no_option_ends_the_run_in_one_line(argument):
    with pytest.raises(SystemExit, match="no option here|whole numbers|choose from"):
        benchmark.main(["--device=cpu", argument])


def test_a_model_that_is_none_or_wants_a_gpu_ends_the_run_in_one_line():
    for name, message in (("bert-huge", "choose from minilm"), ("llama3-8b", "want a GPU")):
        with pytest.raises(SystemExit, match=message):
            benchmark.main([f"--models={name}", "--device=cpu"])


def test_dual_lora_keeps_nothing_of_the_weights_shape():
    chosen = benchmark.layers((40, 24), 2, torch.float32, CPU)
    x = torch.randn(5, 24, requires_grad=True)
    largest = {name: max((t.untyped_storage().nbytes() for t in benchmark.kept(layer, x)), default=0) for name, layer in chosen.items()}
    weight = 40 * 24 * 4
    assert largest["Dual LoRA"] < 100 and largest["full training"] == 0
    assert largest["Dual LoRA, dropout 0.05"] <= 5 * 24 * 4, "the dropped input and its mask"
    assert largest["Dual LoRA, plain autograd"] >= weight and largest["Dual LoRA, first draft"] >= weight


def test_peak_memory_is_what_the_allocator_gave_out():
    layer = torch.nn.Linear(300, 200, bias=False)
    x, gradient = torch.randn(50, 300, requires_grad=True), torch.randn(50, 200)
    peak = benchmark.peak_extra(lambda: benchmark.once(layer, x, gradient), CPU)
    assert 4 * (50 * 200 + 50 * 300 + 200 * 300) <= peak < 4 * (50 * 200 + 50 * 300 + 200 * 300) + 1000, "y, dL/dx and dL/dW"


def test_traffic_counts_what_is_read_and_written(monkeypatch):
    a, b, c = (torch.zeros(64, 64) for _ in range(3))
    cases = [(lambda: torch.add(a, b, out=c), 3), (lambda: a.relu_(), 2), (lambda: c.copy_(a), 2), (lambda: c.zero_(), 1), (lambda: a * b, 3),
             (lambda: a + 1, 2), (lambda: a.to(torch.bfloat16), 1.5), (lambda: a[:32] * b[:32], 1.5), (lambda: a[:32] + a[:32], 1),
             (lambda: a.to(torch.float32), 0), (lambda: a.t()[3:], 0), (lambda: torch.empty_like(a), 0), (lambda: torch.zeros(FEW, 64) @ a, 0)]
    for action, passes in cases:
        with Traffic(floor=1000) as counter:
            action()
        assert counter.bytes == passes * 64 * 64 * 4
    monkeypatch.setattr(benchmark, "CACHE", 1000)  # then the second reading of the same rows is one more from memory
    with Traffic(floor=1000) as counter:
        a[:32] + a[:32]
    assert counter.bytes == 1.5 * 64 * 64 * 4


def test_dual_lora_moves_little_more_than_on_paper():
    shape = 1100, 1024  # more than the cache, so that rows count and blocks do not
    chosen = benchmark.layers(shape, 4, torch.float32, CPU)
    counted = {name: benchmark.traffic(layer, shape, torch.float32, CPU) / (shape[0] * shape[1] * 4) for name, layer in chosen.items()}
    assert counted["full training"] == counted["LoRA"] == 0 < counted["DoRA"]
    assert benchmark.PASSES["Dual LoRA"] <= counted["Dual LoRA"] <= 6 and 3 <= counted["Dual LoRA, dropout 0.05"] <= 4
    assert counted["Dual LoRA, plain autograd"] > 20 and counted["Dual LoRA, first draft"] > 20


def test_a_row_that_does_not_fit_says_so_and_the_others_go_on(monkeypatch):
    class TooLarge(torch.nn.Linear):
        def forward(self, x):
            raise torch.OutOfMemoryError("no room")

    layers = benchmark.layers
    monkeypatch.setattr(benchmark, "layers", lambda *args: {**layers(*args), "full training": TooLarge(16, 24, bias=False)})
    shown = benchmark.layer_table(benchmark.measure_layer((24, 16), 8, torch.float32, 2, 1, CPU))
    assert row(shown, "full training")[1] == TOO_LARGE and row(shown, "Dual LoRA")[5] == "", "no limit to compare with"
    assert float(row(shown, "Dual LoRA")[3]) > 0


def test_whole_models_run_end_to_end_with_as_many_parameters_as_theirs(capsys):
    benchmark.main([f"--models={','.join(TINY)}", "--batch=2x8", "--rounds=1", "--device=cpu"])
    tables = dict(zip(TINY, capsys.readouterr().out.split("medians over")[1:]))
    for shown in tables.values():
        for name in benchmark.METHODS | (benchmark.THEIRS if THERE else {}):
            assert float(row(shown, name)[3]) > 0 and TOO_LARGE not in row(shown, name)
        assert row(shown, "Dual LoRA")[-1] == row(shown, "LoRA")[-1] != row(shown, "full training")[-1]
        if THERE:
            assert row(shown, "transformers + peft lora")[-1] == row(shown, "LoRA")[-1]


@pytest.mark.parametrize("method", [*benchmark.METHODS, *(benchmark.THEIRS if THERE else {})])
def test_checkpointing_and_bfloat16_leave_finite_gradients(method):
    for job in TINY.values():
        model = benchmark.build(job, method, torch.bfloat16, CPU, checkpointing=True)
        benchmark.loss_of(model, torch.randint(5, 60, (2, 8)), torch.tensor([0, 1])).backward()
        grads = [p.grad for p in model.parameters() if p.requires_grad]
        assert all(torch.isfinite(g).all() for g in grads) and any(g.any() for g in grads)


def test_a_method_that_does_not_fit_says_so_and_the_others_go_on(monkeypatch):
    def step(model, idx, labels):
        raise torch.OutOfMemoryError("no room")

    normal = benchmark.loss_of
    full = {"full training"}
    monkeypatch.setattr(benchmark, "loss_of", lambda model, *batch: (step if all(p.requires_grad for p in model.parameters()) else normal)(model, *batch))
    monkeypatch.setattr(benchmark, "THEIRS", {})
    rows = benchmark.measure_model(TINY["tiny-gpt2"]._replace(huge=True), torch.float32, 1, CPU, (2, 8), checkpointing=True)
    assert {name for name, line in rows.items() if line is None} == full
    assert row(benchmark.model_table(rows, 16), "full training")[1] == TOO_LARGE


def test_a_model_can_be_counted_on_tensors_without_memory(capsys):
    benchmark.main(["--models=tiny-gpt2", "--device=meta", "--batch=2x8"])
    shown = capsys.readouterr().out
    assert "counted, not run" in shown
    cells = {name: row(shown, name) for name in benchmark.METHODS}
    assert cells["full training"][7] == "0" != cells["Dual LoRA"][7]
    assert float(cells["Dual LoRA"][5]) < float(cells["Dual LoRA, plain autograd"][5]), "less is kept"
    with pytest.raises(SystemExit, match="--models="):
        benchmark.main(["--device=meta"])
