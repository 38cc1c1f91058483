"""The life of adapters, with followers whose engines are lists."""

import asyncio
import contextlib
import json
import os
import shutil
from dataclasses import replace

import pytest

from serving import registry as registry_module
from serving.adapter_choices import STATE_FILE
from serving.adapter_files import AdapterFolder, PrivateCopies, digest_of
from serving.adapter_states import State
from serving.adapters import check_adapter, read_base
from serving.errors import AdapterError, UnknownModelError
from serving.following import Bulletin, follow_with_bulletin, follow_with_engine
from serving.loaded_adapters import LoadedAdapters
from serving.manifest import Manifest
from serving.protocol import Adapter, LoraRoom
from serving.registry import Registry
from tests.checkpoints import build_adapter
from tests.serving.test_labeler import catalogue

ROOM = LoraRoom(max_rank=16, max_loras=2, max_cpu_loras=4, has_projector=False)


@pytest.fixture(scope="module")
def versions(published, tmp_path_factory):
    """Two different adapters to be copied under any name."""
    folder = tmp_path_factory.mktemp("versions")
    return [build_adapter(published, folder / str(seed), seed=seed) for seed in (1, 2)]


@pytest.fixture(scope="module")
def base(published):
    return read_base(str(published))


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(registry_module, "POLL_S", 0.1)
    monkeypatch.setattr(registry_module, "MEMBER_TTL_S", 0.5)


def put(folder, name, version):
    return shutil.copytree(version, folder / name)


class Slots:
    """An engine that keeps adapters in a dict, and refuses those it is told to."""

    def __init__(self):
        self.loaded, self.bad, self.events = {}, set(), []

    async def load(self, adapter, path, number):
        await asyncio.sleep(0.01)
        if adapter.version in self.bad:
            raise AdapterError(f"vLLM cannot load adapter {adapter.name!r}: broken")
        self.loaded[number] = adapter
        self.events.append(("load", adapter.key))

    async def unload(self, adapter, number):
        del self.loaded[number]
        self.events.append(("unload", adapter.key))

    async def pin(self, number):
        self.events.append(("pin", self.loaded[number].key))

    async def resident(self):
        return set(self.loaded)

    @property
    def keys(self):
        return {adapter.key for adapter in self.loaded.values()}


class Cluster:
    """A registry, engines and HTTP sides that follow it."""

    def __init__(self, folder, base):
        self.shop = catalogue()

        def check(path, name, others):
            installed = check_adapter(path, base, name)
            self.shop.check(name, installed.manifest, others)
            return installed

        self.registry = Registry(AdapterFolder(str(folder)), check, max_pinned=1)
        self.slots, self.holders, self.bulletins, self.tasks = [], [], [], []

    def start_engine(self):
        slots = Slots()
        holder = LoadedAdapters(slots, ROOM, lambda seconds: None)
        self.slots.append(slots)
        self.holders.append(holder)
        self.tasks.append(asyncio.create_task(follow_with_engine(self.registry.follow, holder)))
        return slots

    def start_http(self):
        bulletin = Bulletin(catalogue())
        self.bulletins.append(bulletin)
        self.tasks.append(asyncio.create_task(follow_with_bulletin(self.registry.follow, bulletin)))
        return bulletin

    async def settle(self):
        await asyncio.sleep(0.3)

    def state(self, name, version=""):
        found = [s for s in self.registry.statuses() if (s.name, s.version) == (name, version)]
        return found[0].state if found else None


@contextlib.asynccontextmanager
async def cluster(folder, base, engines=2, https=2):
    it = Cluster(folder, base)
    await it.registry.discover()
    for _ in range(engines):
        it.start_engine()
    for _ in range(https):
        it.start_http()
    await it.settle()
    try:
        yield it
    finally:
        for task in it.tasks:
            task.cancel()
        await asyncio.gather(*it.tasks, return_exceptions=True)
        for holder in it.holders:
            holder.close()


async def test_the_newest_good_version_of_each_name_is_served(tmp_path, base, versions):
    for name in ("a", "a@9", "a@10", "b@1"):
        put(tmp_path, name, versions[0])
    (put(tmp_path, "a@11", versions[1]) / "adapter_model.safetensors").write_bytes(b"junk")
    async with cluster(tmp_path, base) as it:
        served = it.registry.snapshot().served
        assert {name: item.adapter.version for name, item in served.items()} == {
            "a": "10",
            "b": "1",
        }
        assert it.state("a", "11") is State.REFUSED
        assert all(bulletin.catalogue.adapters.keys() == {"a", "b"} for bulletin in it.bulletins)


async def test_an_adapter_that_comes_is_loaded_everywhere_before_it_is_served(
    tmp_path, base, versions
):
    async with cluster(tmp_path, base) as it:
        put(tmp_path, "late", versions[0])
        status = await it.registry.add("late")
        assert (status.state, status.num_holders) == (State.LOADED, 2)
        assert all(len(slots.keys) == 1 for slots in it.slots)
        assert all("late" in bulletin.catalogue.adapters for bulletin in it.bulletins)


async def test_a_new_version_takes_over_and_the_old_one_leaves_after_its_last_request(
    tmp_path, base, versions
):
    put(tmp_path, "a", versions[0])
    async with cluster(tmp_path, base) as it:
        old = it.registry.snapshot().served["a"].adapter
        put(tmp_path, "a@2", versions[1])
        async with it.holders[0].in_use(old):
            await it.registry.add("a")
            await it.settle()
            new = it.registry.snapshot().served["a"].adapter
            assert new.key != old.key
            assert old.key in it.slots[0].keys  # a request still needs it
            assert it.slots[1].keys == {new.key}
        await it.settle()
        assert it.slots[0].keys == {new.key}
        assert (it.state("a"), it.state("a", "2")) == (State.UNLOADED, State.LOADED)


async def test_a_bad_version_is_refused_fifty_times_and_the_old_one_stays(tmp_path, base, versions):
    put(tmp_path, "a", versions[0])
    async with cluster(tmp_path, base) as it:
        put(tmp_path, "a@2", versions[1])
        it.slots[1].bad.add("2")
        served = it.registry.snapshot().served["a"].adapter
        for _ in range(50):
            with pytest.raises(AdapterError, match="broken"):
                await it.registry.add("a")
            assert it.registry.snapshot().served["a"].adapter == served
        await it.settle()
        assert it.state("a", "2") is State.REFUSED
        assert all(served.key in slots.keys or not slots.keys for slots in it.slots)
        it.slots[1].bad.clear()
        assert (await it.registry.add("a")).version == "2"


async def test_followers_that_start_later_agree(tmp_path, base, versions):
    put(tmp_path, "a", versions[0])
    async with cluster(tmp_path, base, engines=1, https=1) as it:
        await it.registry.add("a", pin=True)
        await it.registry.remove("a")
        put(tmp_path, "b", versions[1])
        await it.registry.add("b", pin=True)
        late, slots = it.start_http(), it.start_engine()
        await it.settle()
        assert late.catalogue.adapters.keys() == {"b"}
        key = it.registry.snapshot().served["b"].adapter.key
        assert ("pin", key) in slots.events  # pinned ones are loaded without being asked for
        assert slots.keys == {key}


async def test_a_removed_adapter_is_unknown_until_it_is_added_again(tmp_path, base, versions):
    put(tmp_path, "a", versions[0])
    async with cluster(tmp_path, base) as it:
        await it.registry.add("a")
        assert (await it.registry.remove("a")).state in (State.DRAINING, State.UNLOADED)
        await it.settle()
        assert not any(slots.keys for slots in it.slots)
        assert not it.bulletins[0].catalogue.adapters
        with pytest.raises(UnknownModelError):
            await it.registry.remove("a")
        assert (await it.registry.add("a")).state is State.LOADED


async def test_choices_outlive_the_registry(tmp_path, base, versions):
    for name in ("a", "a@2", "b"):
        put(tmp_path, name, versions[0])
    async with cluster(tmp_path, base) as it:
        await it.registry.add("a", "", pin=True)
        await it.registry.remove("b")
    async with cluster(tmp_path, base) as it:
        snapshot = it.registry.snapshot()
        assert snapshot.served.keys() == {"a"}
        assert snapshot.served["a"].adapter.version == ""
        assert snapshot.pinned == {snapshot.served["a"].adapter.key}
    (tmp_path / STATE_FILE).write_text("{]")
    with pytest.raises(AdapterError, match="registry.json"):
        async with cluster(tmp_path, base):
            pass


async def test_no_more_are_pinned_than_leave_room_for_others(tmp_path, base, versions):
    put(tmp_path, "a", versions[0])
    put(tmp_path, "b", versions[1])
    async with cluster(tmp_path, base) as it:
        await it.registry.add("a", pin=True)
        with pytest.raises(AdapterError, match="allowed are 1"):
            await it.registry.add("b", pin=True)


async def test_unknown_names_and_versions_are_told_apart(tmp_path, base, versions):
    put(tmp_path, "a@1", versions[0])
    async with cluster(tmp_path, base) as it:
        with pytest.raises(UnknownModelError, match="no adapter 'x'"):
            await it.registry.add("x")
        with pytest.raises(UnknownModelError, match=r"version '7'; there are versions \['1'\]"):
            await it.registry.add("a", "7")
        with pytest.raises(UnknownModelError):
            await it.registry.add("../a@1")


async def test_an_engine_that_died_holds_nobody_up(tmp_path, base, versions):
    async with cluster(tmp_path, base) as it:
        it.tasks[0].cancel()
        put(tmp_path, "a", versions[0])
        assert (await asyncio.wait_for(it.registry.add("a"), 5)).num_holders == 1


async def test_an_adapter_that_does_not_go_with_the_others_is_refused(tmp_path, base, versions):
    put(tmp_path, "base", versions[0])  # the base model's own name
    Manifest(label_structure="nowhere").save(put(tmp_path, "b", versions[1]))
    async with cluster(tmp_path, base) as it:
        assert {it.state("base"), it.state("b")} == {State.REFUSED}
        assert not it.registry.snapshot().served


async def test_adapters_lie_behind_a_url_as_well(base, versions):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    memory.put(str(versions[0]), "/shop/far@3", recursive=True)
    async with cluster("memory://shop", base) as it:
        adapter = it.registry.snapshot().served["far"].adapter
        assert adapter.path == "memory:///shop/far@3"
        async with it.holders[0].in_use(adapter):
            assert it.slots[0].keys == {adapter.key}
        await it.registry.remove("far")
        assert json.loads(memory.cat("/shop/registry.json"))["far"]["is_removed"]


def test_files_that_change_under_an_engine_are_noticed(tmp_path, versions):
    folder = put(tmp_path, "a", versions[0])
    adapter = Adapter(name="a", path=str(folder), rank=8, digest=digest_of(folder))
    shutil.copytree(versions[1], folder, dirs_exist_ok=True)
    copies = PrivateCopies()
    with pytest.raises(AdapterError, match="changed after it was registered"):
        copies.take(adapter)
    again = replace(adapter, digest=digest_of(folder))
    path = copies.take(again)
    shutil.rmtree(folder)
    assert copies.take(again) == path  # an evicted adapter is read again from here
    copies.close()
    assert not path.exists()


async def test_room_is_asked_before_the_engine_is(tmp_path, versions):
    holder = LoadedAdapters(Slots(), ROOM, lambda seconds: None)
    big = Adapter(name="big", path=str(versions[0]), rank=32)
    with pytest.raises(AdapterError, match="--max-lora-rank 32"):
        await holder.prepare(big)
    sharp = Adapter(name="sharp", path=str(versions[0]), rank=8, has_projector=True)
    with pytest.raises(AdapterError, match="--projector-lora"):
        await holder.prepare(sharp)
    with pytest.raises(AdapterError, match="--adapters"):
        await LoadedAdapters(Slots(), None, print).prepare(sharp)


async def test_an_engine_without_room_for_adapters_is_not_asked_which_it_holds():
    class WithoutLora(Slots):
        async def resident(self):
            raise RuntimeError("LoRA is not enabled")

    assert await LoadedAdapters(WithoutLora(), None, print).resident() == frozenset()


async def test_many_requests_for_a_cold_adapter_load_it_once(versions):
    slots = Slots()
    holder = LoadedAdapters(slots, ROOM, lambda seconds: None)
    adapter = Adapter(name="a", path=str(versions[0]), rank=8, digest=digest_of(versions[0]))

    async def ask():
        async with holder.in_use(adapter):
            assert adapter.key in slots.keys

    await asyncio.gather(*(ask() for _ in range(20)))
    assert slots.events == [("load", adapter.key)]


async def test_an_adapter_that_the_engine_evicted_is_loaded_again(versions):
    slots = Slots()
    holder = LoadedAdapters(slots, ROOM, lambda seconds: None)
    adapter = Adapter(name="a", path=str(versions[0]), rank=8, digest=digest_of(versions[0]))
    await holder.prepare(adapter)
    slots.loaded.clear()
    assert await holder.resident() == frozenset()
    async with holder.in_use(adapter):
        assert adapter.key in slots.keys


def test_copies_of_a_killed_process_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "sieve-adapters-4194999-x").mkdir()  # above the largest process id
    (tmp_path / f"sieve-adapters-{os.getpid()}-x").mkdir()
    copies = PrivateCopies()
    left = sorted(path.name.split("-")[2] for path in tmp_path.iterdir())
    assert left == [str(os.getpid())] * 2
    copies.close()
