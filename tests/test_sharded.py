"""Two processes, DistributedDataParallel and fully_shard: losses, saved file and outputs equal one process's."""
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn as nn
import torch.nn.functional as F

from dual_lora import apply_adapters, load_adapter, merge_adapters, merged, save_adapter, set_warmup

pytestmark = pytest.mark.slow


def base(dtype):
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(2)]
    return nn.Sequential(*blocks, nn.Linear(16, 4)).to(dtype)


def adapted(dtype):
    model = base(dtype)
    torch.manual_seed(1)
    apply_adapters(model, ["0.0", "0.2", "1.0", "1.2"], r1=2, r2=2, init_std=0.1)
    model[2].requires_grad_(True)
    return model


def train(model, x, labels):
    """Losses of five steps."""
    losses = []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    for step in range(5):
        set_warmup(model, min(1.0, (step + 1) / 3))
        losses.append(F.cross_entropy(model(x).float(), labels))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(losses).detach()


def one_of_two(rank, kind, dtype, x, labels, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    model = adapted(dtype)
    if kind == "DistributedDataParallel":
        model = nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.fsdp import fully_shard
        for block in (model[0], model[1], model):
            fully_shard(block)
    losses = train(model, *(part.chunk(2)[rank] for part in (x, labels)))
    dist.all_reduce(losses)
    save_adapter(model, f"{folder}/adapter.pt")
    refused = []
    if kind == "fully_shard":
        for verb in (lambda: merged(model).__enter__(), lambda: merge_adapters(model)):
            with pytest.raises(ValueError, match="sharded by fully_shard: evaluate without `merged`") as error:
                verb()
            refused.append(str(error.value))
    with torch.no_grad():
        y = model.eval()(x)
    if rank == 0:
        torch.save({"losses": losses / 2, "y": y}, f"{folder}/result.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["DistributedDataParallel", "fully_shard"])
def test_two_processes_equal_one(kind, dtype, tmp_path):
    if kind == "fully_shard" and torch.__version__ < (2, 9):  # 2.6 runs it on no CPU, 2.7 takes one dtype a group
        pytest.skip("needs torch 2.9")
    torch.manual_seed(5)
    x, labels = torch.randn(16, 16).to(dtype), torch.randint(0, 4, (16,))
    alone = adapted(dtype)
    losses = train(alone, x, labels)
    mp.spawn(one_of_two, (kind, dtype, x, labels, tmp_path), nprocs=2)
    result, close = torch.load(tmp_path / "result.pt"), dict(rtol=0, atol=1e-5 if dtype == torch.float32 else 5e-3)
    torch.testing.assert_close(result["losses"], losses, **close)
    for model in (alone, load_adapter(base(dtype), tmp_path / "adapter.pt")):
        torch.testing.assert_close(model.eval()(x), result["y"], **close)
