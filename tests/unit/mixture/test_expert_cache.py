"""Paging: who has a slot, that it changes no number, and that a tampered expert never answers, however late it is read.
"""

import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from moa.base import load, pin
from moa.base.device import Device
from moa.base.encoding import ChatEncoder
from moa.base.load import Base
from moa.core import config
from moa.core.errors import ArtifactError
from moa.core.paths import Workspace
from moa.experts import peft_format
from moa.experts.lora import BASE_ONLY, ExpertStack, LoraSpec
from moa.experts.peft_format import WEIGHTS
from moa.mixture import artifact
from moa.mixture.calibration import Prompts, fit
from moa.mixture.expert_cache import ExpertCache, ExpertLoader
from moa.mixture.mixture import BASE, Mixture
from moa.mixture.router import features
from tests import tiny

LABELS = ["ada", "bob", "cyd", "dan", "eve"]
SPECS = [LoraSpec(4, 8.0), LoraSpec(1, 3.0), LoraSpec(2, 6.0, rslora=True), LoraSpec(3, 3.0), LoraSpec(2, 4.0)]
PARTLY = 3   # adapts one kind of layer only
experts_of_a_batch = st.lists(st.integers(BASE_ONLY, 8), max_size=12)


class Counted:
    """An ExpertCache without weights, and who was loaded into which slot."""

    def __init__(self, slots: int) -> None:
        self.content: dict[int, int] = {}
        self.loads: list[int] = []
        self.pages = ExpertCache(slots, self.load)

    def load(self, expert: int, slot: int) -> None:
        assert 0 <= slot < self.pages.slots.count
        self.content[slot] = expert
        self.loads.append(expert)


# Slots.

@given(slots=st.integers(1, 5), batches=st.lists(experts_of_a_batch, max_size=12))
def test_the_longest_unused_makes_room(slots: int, batches: list[list[int]]) -> None:
    counted, recent = Counted(slots), list[int]()   # the experts that must be there, last used last
    for batch in batches:
        for part in counted.pages.parts(batch):
            asked = [batch[place] for place in part]
            wanted = [expert for expert in dict.fromkeys(asked) if expert != BASE_ONLY]
            new, counted.loads = [expert for expert in wanted if expert not in recent], []
            with counted.pages.using(asked) as found:
                assert sorted(counted.loads) == sorted(new)
                for expert, slot in zip(asked, found, strict=True):
                    assert slot == BASE_ONLY if expert == BASE_ONLY else counted.content[slot] == expert
            kept = [expert for expert in wanted if expert in recent]
            recent = ([expert for expert in recent if expert not in wanted] + kept + new)[-slots:]
            assert set(counted.content.values()) == set(recent)


@given(slots=st.integers(1, 5), experts=experts_of_a_batch, before=experts_of_a_batch)
def test_a_batch_is_split_as_little_as_the_slots_allow(slots: int, experts: list[int], before: list[int]) -> None:
    counted = Counted(slots)
    for part in counted.pages.parts(before):
        with counted.pages.using([before[place] for place in part]):
            pass
    parts = counted.pages.parts(experts)
    assert sorted(place for part in parts for place in part) == list(range(len(experts)))
    distinct = [{experts[place] for place in part} - {BASE_ONLY} for part in parts]
    assert all(len(each) <= slots for each in distinct)
    assert len(parts) == max(-(-len(set(experts) - {BASE_ONLY}) // slots), 1)
    assert sum(map(len, distinct)) == len(set().union(*distinct))   # nobody is in two


@given(outer=st.integers(0, 3), inner=st.lists(st.integers(0, 8), max_size=8))
def test_an_expert_in_use_keeps_its_slot(outer: int, inner: list[int]) -> None:
    counted = Counted(2)
    with counted.pages.using([outer]) as (slot,):
        for expert in inner:
            with counted.pages.using([expert]):
                assert counted.content[slot] == outer
        assert counted.pages.slots[outer] == slot


def test_an_expert_that_cannot_be_read_leaves_its_slot_free() -> None:
    counted = Counted(2)
    load = counted.load

    def broken(expert: int, slot: int) -> None:
        load(expert, slot)   # half of it is there
        if expert == 7:
            raise ArtifactError("torn")

    counted.pages = ExpertCache(2, broken)
    with counted.pages.using([1, 2]):
        pass
    for _ in range(2):
        with pytest.raises(ArtifactError, match="torn"), counted.pages.using([2, 7]):
            pass
        assert 7 not in counted.pages.slots and 1 not in counted.pages.slots and 2 in counted.pages.slots
    with counted.pages.using([1, 2]) as slots:
        assert [counted.content[slot] for slot in slots] == [1, 2]


# A mixture on disk.

@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """A base, and a mixture of experts of different sizes whose weights are random."""
    made = tiny.workspace(tmp_path_factory.mktemp("paging"), ())
    params = config.load(made.params)
    pin.fetch(made, params.base)
    loaded = plain(made)
    encoder = ChatEncoder(loaded.tokenizer, params.prompt.system, params.prompt.max_tokens)
    prompts = [encoder.prompt(ask(label, number)) for label in LABELS for number in range(6)]
    seen, targets = features(loaded.model, prompts), torch.arange(len(LABELS)).repeat_interleave(6)
    train = Prompts(seen, targets, [str(number) for number in range(len(targets))])
    router = fit(LABELS, train, train, max_abstention=None)
    stack = ExpertStack(loaded.model, SPECS)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in stack.layers.values():
            for expert, spec in enumerate(SPECS):
                layer.a_ERI[expert, :spec.rank].normal_(0, 0.5, generator=generator)
                layer.b_EOR[expert, :, :spec.rank].normal_(0, 0.5, generator=generator)
    stack.shapes[PARTLY] = {name: spec for name, spec in stack.shapes[PARTLY].items() if name.endswith("q_proj")}
    folders = {label: made.root / "made" / label for label in LABELS}
    for expert, folder in enumerate(folders.values()):
        peft_format.save(stack, expert, folder, loaded.pin.source)
    made.mixture.mkdir(parents=True)
    artifact.write(made.mixture, base=loaded.pin, prompt=params.prompt.model_dump(), router=router, experts=folders,
                   facts={label: {} for label in LABELS})
    yield made


def plain(workspace: Workspace, dtype: str = "float32") -> Base:
    """The base of its own."""
    return load.load(workspace, config.load(workspace.params).base, Device("cpu", dtype, "sums that can be compared"))


def ask(label: str, number: int = 0) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"{label * 3}? {number} of {label}"}]


@pytest.fixture(scope="module")
def whole(workspace: Workspace) -> Mixture:
    return Mixture.load(workspace.mixture, plain(workspace))


@pytest.fixture
def paged(workspace: Workspace) -> Mixture:
    return Mixture.load(workspace.mixture, plain(workspace), resident=2)


@pytest.fixture
def copied(workspace: Workspace, tmp_path: Path) -> Path:
    return Path(shutil.copytree(workspace.mixture, tmp_path / "mixture"))


def logits(mixture: Mixture, experts: list[int], ids_BT: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode(), mixture._using(experts):
        return mixture.base.model(ids_BT, use_cache=False).logits


def test_paging_changes_no_bit_of_the_logits(whole: Mixture, paged: Mixture) -> None:
    """Slots are reused by larger and smaller experts, and by one that adapts few layers: none leaves anything."""
    ids = torch.randint(3, 200, (3, 9), generator=torch.Generator().manual_seed(3))
    alone = logits(whole, [BASE_ONLY] * 3, ids)
    for experts in ([0, 1, 0], [2, 3, BASE_ONLY], [3, 0, 3], [4, 4, 1], [1, 3, 1], [0, BASE_ONLY, 0]):
        found = logits(paged, experts, ids)
        assert torch.equal(found, logits(whole, experts, ids))
        assert [torch.equal(*pair) for pair in zip(found, alone, strict=True)] == [e == BASE_ONLY for e in experts]
    assert len(paged.stack) == 2 and paged.pages.loaded > 6


def test_more_experts_than_slots_are_answered_all_the_same(workspace: Workspace) -> None:
    whole, paged = (Mixture.load(workspace.mixture, plain(workspace, "float64"), slots) for slots in (None, 2))
    domains = [*LABELS, BASE, *reversed(LABELS)]
    prompts = [ask(domain, number) for number, domain in enumerate(domains)]
    expected = whole.generate(prompts, domains, max_new_tokens=6)
    assert paged.generate(prompts, domains, max_new_tokens=6) == expected
    assert len({one.answer for one in expected}) > len(LABELS)
    rows = [[*prompt, {"role": "assistant", "content": "well"}] for prompt in prompts]
    before = paged.pages.loaded
    losses = paged.losses(rows, domains)
    assert [loss for loss, _ in losses] == pytest.approx([loss for loss, _ in whole.losses(rows, domains)], abs=1e-9)
    assert paged.pages.loaded - before <= len(LABELS)   # each at most once, however the rows lie
    assert paged.route(prompts) == whole.route(prompts)


def test_threads_take_turns(paged: Mixture, whole: Mixture) -> None:
    found: dict[str, Any] = {}

    def work(domain: str) -> None:
        found[domain] = [paged.chat(ask(domain, number), domain, max_new_tokens=4) for number in range(3)]

    threads = [threading.Thread(target=work, args=(label,)) for label in LABELS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {label: [whole.chat(ask(label, number), label, max_new_tokens=4) for number in range(3)]
                     for label in LABELS}


def test_a_mixture_that_fits_is_loaded_whole_and_in_order(whole: Mixture) -> None:
    loaded = whole.pages.loaded
    whole.generate([ask(label) for label in LABELS], LABELS, max_new_tokens=1)
    assert whole.pages.loaded == loaded == len(LABELS) == len(whole.stack)
    assert [whole.pages.slots[expert] for expert in range(len(LABELS))] == list(range(len(LABELS)))


def test_unloading_gives_the_base_back(workspace: Workspace) -> None:
    before = plain(workspace).model.state_dict()
    mixture = Mixture.load(workspace.mixture, plain(workspace), resident=1)
    mixture.generate([ask(label) for label in LABELS], LABELS, max_new_tokens=1)
    after = mixture.unload().model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_a_router_that_chooses_layer_by_layer_has_every_expert_at_hand(copied: Path, workspace: Workspace) -> None:
    manifest, router, folders = artifact.read(copied, pin.pin(workspace))
    router.stream = "experts"
    again = copied.parent / "joint"
    again.mkdir()
    artifact.write(again, base=pin.pin(workspace), prompt=manifest["prompt"], router=router, experts=folders,
                   facts=manifest["experts"])
    assert len(Mixture.load(again, plain(workspace), resident=2).stack) == len(LABELS)


# Files.

def test_an_expert_of_a_known_layout_is_copied_into_its_slot(workspace: Workspace, tmp_path: Path,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, made, careful = plain(workspace), ["first", "second", "nan", "half", "small"], list[Path]()
    stack = ExpertStack(loaded.model, [LoraSpec(2, 4.0)] * 3)
    for seed, name in enumerate(made):
        stack.weights[0].normal_(0, 1, generator=torch.Generator().manual_seed(seed))
        peft_format.save(stack, 0, tmp_path / name, "toy")
    rewrite(tmp_path / "nan", lambda name, tensor: tensor * torch.nan if "1.mlp.up_proj.lora_B" in name else tensor)
    rewrite(tmp_path / "half", lambda _, tensor: tensor.half())
    stack.specs[0] = LoraSpec(1, 3.0)
    stack.shapes[0] = dict.fromkeys(stack.layers, stack.specs[0])
    peft_format.save(stack, 0, tmp_path / "small", "toy")
    expected = {}
    for name in ("first", "second", "half", "small"):
        peft_format.load(stack, 0, tmp_path / name)
        expected[name] = stack.weights[0].clone()
    load = peft_format.load

    def counted(stack: ExpertStack, slot: int, folder: Path) -> None:
        careful.append(folder)
        load(stack, slot, folder)

    monkeypatch.setattr(peft_format, "load", counted)
    loader, stack.weights[:] = ExpertLoader(stack), 7.0
    for slot, name in [(0, "first"), (1, "second"), (2, "small"), (2, "second"), (0, "half"), (0, "first")] * 2:
        loader.load(slot, tmp_path / name)
        assert torch.equal(stack.weights[slot], expected[name])
        assert {layer.scale_E[slot].item() for layer in stack.layers.values()} == {3.0 if name == "small" else 2.0}
    assert [folder.name for folder in careful] == ["first", "small", "half", "small", "half"]
    with pytest.raises(ArtifactError, match=r"nan: model\.layers\.1\.mlp\.up_proj: the weights are not finite numbers"):
        loader.load(0, tmp_path / "nan")
    (tmp_path / "second" / WEIGHTS).unlink()
    with pytest.raises(ArtifactError, match="second is no PEFT adapter"):
        loader.load(0, tmp_path / "second")


# A tampered expert never answers.

def rewrite(folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({name: change(name, tensor) for name, tensor in tensors.items()}, folder / WEIGHTS,
              metadata={"format": "pt"})


def scaled(path: Path) -> None:
    rewrite(path, lambda _, tensor: tensor * 1.5)


def one_byte(path: Path) -> None:
    """In place: as long as it was, and the same file."""
    with (path / WEIGHTS).open("r+b") as file:
        file.seek(-3, 2)
        byte = file.read(1)[0]
        file.seek(-3, 2)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("change", [scaled, one_byte, lambda path: (path / "more").write_text("?")])
@pytest.mark.parametrize("used", [False, True])
def test_a_tampered_expert_is_refused_when_it_is_paged_in(workspace: Workspace, copied: Path, used: bool,
                                                          change: Callable[[Path], Any]) -> None:
    """`used`: it was right when it was paged in before."""
    mixture = Mixture.load(copied, plain(workspace), resident=2)
    if used:
        mixture.chat(ask("dan"), "dan", max_new_tokens=2)
        for other in ("ada", "bob"):
            mixture.chat(ask(other), other, max_new_tokens=2)
    change(copied / artifact.EXPERTS / "dan")
    for _ in range(2):
        with pytest.raises(ArtifactError, match=r"^The expert 'dan' in .* is not the one its manifest pins\.$"):
            mixture.generate([ask("ada"), ask("dan")], ["ada", "dan"], max_new_tokens=2)
    assert mixture.chat(ask("ada"), "ada", max_new_tokens=2).domain == "ada"
    assert mixture.stack.selection.batch is None


def test_a_missing_expert_is_named(workspace: Workspace, copied: Path) -> None:
    mixture = Mixture.load(copied, plain(workspace), resident=2)
    shutil.rmtree(copied / artifact.EXPERTS / "eve")
    with pytest.raises(ArtifactError, match=r"'eve' that the manifest in .* is not there"):
        mixture.chat(ask("eve"), "eve")
