"""An engine whose workers run on a Ray cluster: a real one, of one machine on loopback, whose processes are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from clockwork import EPISODE, Scribe, clockwork_cfg, order, update_policy
from owning import owner
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from waiting import PATIENCE, wait_until

from embodichain_rl import OnlineDataEngine
from embodichain_rl.cluster import RayCluster
from embodichain_rl.errors import ClusterConnectionError, ClusterResourcesError, ConfigError
from embodichain_rl.shared import process_start

cluster_utils = pytest.importorskip("ray.cluster_utils", reason="needs Ray, the extra 'ray'")

pytestmark = pytest.mark.slow

CHUNK = 3


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")  # or beside other programs, they start after minutes
        cluster = start_cluster()
        yield cluster.address
        cluster.shutdown()


def start_cluster() -> Any:
    node = {"num_cpus": 2, "include_dashboard": False, "object_store_memory": 100 << 20}
    node["node_ip_address"] = "127.0.0.1"
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return cluster_utils.Cluster(initialize_head=True, connect=False, head_node_args=node)
        except Exception as error:  # of no other type: Ray gives a raylet 30 s, which a busy machine may not have
            if "timed out during startup" not in str(error) or time.monotonic() > deadline:
                raise


def make_policy(action: float) -> TensorDictModule:
    module = torch.nn.Linear(2, 1)
    torch.nn.init.zeros_(module.weight)
    torch.nn.init.constant_(module.bias, action)
    return TensorDictModule(module, ["observation"], ["action"])


@pytest.fixture(scope="module")
def engine(address: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OnlineDataEngine]:
    settings: dict[str, Any] = {
        "num_workers": 2,
        "max_worker_restarts": 10,
        "policy": make_policy(0.25),
        "label_source": True,
    }
    cfg = clockwork_cfg(tmp_path_factory.mktemp("commands"), start_method=None, **settings, cluster=RayCluster(address))
    with OnlineDataEngine(cfg) as engine:
        yield engine


def check(batch: TensorDict) -> TensorDict:
    """Check that each chunk is consecutive steps of one episode."""
    steps = batch["observation"][..., 1]
    assert (steps.diff(dim=1) == 1).all()
    assert (batch["observation"][..., 0] == batch["observation"][:, :1, 0]).all()
    assert (batch["next", "observation"][..., 1] == steps + 1).all()
    assert (batch["next", "done"].squeeze(-1) == (steps + 1 == EPISODE)).all()
    return batch


def written(engine: OnlineDataEngine) -> list[int]:
    return [worker["trajectories"] for worker in engine.stats()["workers"]]


def wait_for_more(engine: OnlineDataEngine) -> None:
    """Wait until each worker has written another trajectory, and check samples meanwhile."""
    before = written(engine)

    def more() -> bool:
        check(engine.sample_batch(4, CHUNK))
        return all(now > then for now, then in zip(written(engine), before, strict=True))

    wait_until(more, lambda: f"a trajectory of each worker after {before}; {engine.stats()}")


def test_trajectories_of_all_workers_arrive_whole(engine: OnlineDataEngine) -> None:
    wait_for_more(engine)
    whole = engine.shared_buffer
    assert (whole["collector", "mask"].sum(-1) == EPISODE).all()
    mask = whole["collector", "mask"]
    assert (whole["action"][mask] == 0.25).all()
    assert {*engine.texts.resolve(whole["collector", "source"][mask])} == {"policy"}


def test_statistics_name_the_machines(engine: OnlineDataEngine) -> None:
    wait_for_more(engine)
    stats = engine.stats()
    (node,) = stats["nodes"]
    assert node["node"].startswith("127.0.0.1")
    assert node["workers"] == [0, 1]
    assert 0 < node["in_flight"] <= 4
    assert node["messages"] > 0
    assert node["lag"] >= 0.0
    # The bytes of the steps that arrived, and little more. Some have not been written yet.
    assert node["bytes"] >= stats["inserted"] * EPISODE * engine.replay_buffer.storage.nbytes_per_step
    assert {worker["collector"] for worker in stats["workers"]} == {"GymnasiumCollector"}


def test_new_weights_reach_all_workers(engine: OnlineDataEngine) -> None:
    wait_for_more(engine)
    update_policy(engine, make_policy(0.5))
    version = engine.stats()["policy_version"]
    wait_until(lambda: engine.stats()["policy_lag_max"] == 0, "trajectories of the new policy only")
    live = engine.replay_buffer.storage.ledger.live_rows()
    assert (live.policy_versions == version).all()
    # The episodes that were under way when the weights were swapped have actions of both.
    wait_for_more(engine)
    wait_for_more(engine)
    wait_until(lambda: (engine.sample_batch(4, CHUNK)["action"] == 0.5).all(), "actions of the new policy")


def test_held_workers_rest_until_they_are_released(engine: OnlineDataEngine) -> None:
    engine.hold()
    wait_until(lambda: all(worker["held"] for worker in engine.stats()["workers"]), "the rest of all workers")
    engine.release()
    wait_until(lambda: not any(worker["held"] for worker in engine.stats()["workers"]), "the end of the rest")
    wait_for_more(engine)


def test_a_worker_that_raises_is_replaced(engine: OnlineDataEngine, caplog: pytest.LogCaptureFixture) -> None:
    wait_for_more(engine)
    restarts = engine.stats()["restarts"]
    order(Path(engine.cfg.gym_config["kwargs"]["commands"]), "reset", "raise")  # type: ignore[index, call-overload]
    wait_until(lambda: engine.stats()["restarts"] == restarts + 1, "the replacement of the worker")
    wait_for_more(engine)
    assert "misbehaved at reset" in caplog.text


def test_a_killed_worker_is_replaced(engine: OnlineDataEngine) -> None:
    wait_for_more(engine)
    restarts, pid = engine.stats()["restarts"], engine.stats()["workers"][1]["pid"]
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: engine.stats()["restarts"] == restarts + 1, "the replacement of the worker")
    wait_for_more(engine)
    assert engine.stats()["workers"][1]["pid"] not in (0, pid)
    assert (engine.sample_batch(4, CHUNK)["action"] == 0.5).all()  # its replacement has the newest weights


def test_a_killed_gateway_is_replaced_and_the_buffer_stays(engine: OnlineDataEngine) -> None:
    wait_for_more(engine)
    (gateway,) = [pid for pid in children_of(os.getpid()) if "spawn_main" in command_of(pid)]
    restarts, pids = engine.stats()["restarts"], [worker["pid"] for worker in engine.stats()["workers"]]
    os.kill(gateway, signal.SIGKILL)
    wait_until(lambda: engine.stats()["restarts"] == restarts + 1, "the replacement of the gateway")
    check(engine.sample_batch(4, CHUNK))
    wait_for_more(engine)
    wait_until(lambda: all(process_start(pid) < 0 for pid in pids), "the end of the first gateway's actors")


OTHER_LEARNER = """
from embodichain_rl import OnlineDataEngine
from embodichain_rl.cluster import RayCluster

if __name__ == "__main__":
    cluster = RayCluster({address!r}, worker_options={{"num_cpus": 0}})
    with OnlineDataEngine(clockwork_cfg(commands, start_method=None, num_workers=2, cluster=cluster)) as engine:
        while True:
            engine.sample_batch(4, 3)
            written = [worker["trajectories"] for worker in engine.stats()["workers"]]
            if min(written):
                print(*(worker["pid"] for worker in engine.stats()["workers"]), "filled", flush=True)
                break
        time.sleep(3600)
"""


def test_two_learners_share_a_cluster_but_no_fate(engine: OnlineDataEngine, address: str, tmp_path: Path) -> None:
    wait_for_more(engine)
    with owner(OTHER_LEARNER.format(address=address), tmp_path) as other:
        other.says("filled")
        theirs = [int(pid) for pid in other.output.split()[:2]]
        stats = engine.stats()
        assert len({*theirs, *(worker["pid"] for worker in stats["workers"])}) == 4
        wait_for_more(engine)
        assert engine.stats()["restarts"] == stats["restarts"]
        other.process.send_signal(signal.SIGKILL)
        wait_until(lambda: all(process_start(pid) < 0 for pid in theirs), "the end of the other learner's actors")
        other.is_gone()  # and of its gateway
    wait_for_more(engine)
    assert engine.stats()["restarts"] == stats["restarts"]
    assert [worker["pid"] for worker in engine.stats()["workers"]] == [worker["pid"] for worker in stats["workers"]]


def test_stop_leaves_no_process(engine: OnlineDataEngine) -> None:
    wait_for_more(engine)
    pids = [worker["pid"] for worker in engine.stats()["workers"]]
    engine.stop()
    wait_until(lambda: all(process_start(pid) < 0 for pid in pids), "the end of the actors")
    assert not [pid for pid in children_of(os.getpid()) if "spawn_main" in command_of(pid)]
    closed = Path(engine.cfg.gym_config["kwargs"]["commands"])  # type: ignore[index, call-overload]
    assert all((closed / f"closed-{pid}").exists() for pid in pids)


def test_texts_leave_and_images_travel_encoded_from_a_cluster_of_its_own(tmp_path: Path) -> None:
    options = {"_node_ip_address": "127.0.0.1", "num_cpus": 1, "object_store_memory": 100 << 20}
    cluster = RayCluster("local", init_options=options)
    settings: dict[str, Any] = {"num_workers": 1, "compress": {"pixels": "png"}, "compact": True}
    cfg = clockwork_cfg(tmp_path, 0.0, "Scribe-v0", start_method=None, cluster=cluster, **settings)
    with OnlineDataEngine(cfg) as engine:
        engine.sample_batch(4, CHUNK)
        # The learner is on the same machine. Ray would let it, and all other programs, come before the worker.
        assert os.getpriority(os.PRIO_PROCESS, engine.stats()["workers"][0]["pid"]) == 0

        def swept() -> bool:
            batch = check(engine.sample_batch(4, CHUNK))
            steps = batch["observation"][..., 1].to(torch.uint8)
            assert (batch["pixels"] == steps[..., None, None, None]).all()
            assert (batch["next", "pixels"] == steps[..., None, None, None] + 1).all()
            return engine.texts.generation > 2

        early = engine.sample_batch(4, CHUNK)["text 0"]
        wait_until(swept, lambda: f"the end of many texts; {engine.texts}")
        assert engine.texts.get(int(early[0, 0])) is None
        engine.hold()
        wait_until(lambda: all(worker["held"] for worker in engine.stats()["workers"]), "the rest of the worker")
        batch = engine.sample_batch(4, CHUNK)
        for name in Scribe.TEXTS:
            for texts, observed in zip(engine.texts.resolve(batch[name]), batch["observation"].long(), strict=True):
                for text, (episode, step) in zip(texts, observed.tolist(), strict=True):
                    assert text.startswith(f"{name} of {episode} {step} ")


def test_the_error_of_a_wrong_address_names_it(tmp_path: Path) -> None:
    cfg = clockwork_cfg(tmp_path, start_method=None, cluster=RayCluster("127.0.0.1:1"))
    with pytest.raises(ClusterConnectionError, match=r"127\.0\.0\.1:1"):
        OnlineDataEngine(cfg).start()


def test_the_error_of_missing_resources_names_them(address: str, tmp_path: Path) -> None:
    cluster = RayCluster(address, worker_options={"resources": {"simulator": 1}})
    cfg = clockwork_cfg(tmp_path, start_method=None, cluster=cluster)
    with pytest.raises(ClusterResourcesError, match=r"0 of 1 workers.*simulator"):
        OnlineDataEngine(cfg).start()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"address": "ray://head:10001"}, "Ray Client"),
        ({"address": "head"}, "host:port"),
        ({"worker_options": {"max_restarts": 1}}, "max_restarts"),
        ({"worker_options": {"runtime_env": {}}}, "runtime_env"),
        ({"init_options": {"address": "auto"}}, "address"),
        ({"message_bytes": 0}, "message_bytes"),
        ({"in_flight": 0}, "in_flight"),
        ({"runtime_env": "here"}, "runtime_env"),
    ],
)
def test_invalid_options_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RayCluster(**arguments)


def test_a_cluster_excludes_what_belongs_to_this_machine(tmp_path: Path) -> None:
    for settings in ({"num_workers": 0}, {"start_method": "spawn"}):
        with pytest.raises(ConfigError, match=next(iter(settings))):
            clockwork_cfg(tmp_path, **{"start_method": None, **settings}, cluster=RayCluster())
    with pytest.raises(ConfigError, match="cluster"):
        clockwork_cfg(tmp_path, start_method=None, cluster="auto")


def test_importing_the_package_does_not_import_ray() -> None:
    code = "import sys, embodichain_rl, embodichain_rl.cluster; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": sys.path[0]}).returncode == 0


def children_of(pid: int) -> list[int]:
    lists = [file.read_text().split() for file in Path(f"/proc/{pid}/task").glob("*/children")]
    return [int(child) for children in lists for child in children]


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except FileNotFoundError:
        return ""
