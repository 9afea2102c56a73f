"""A checkpoint is restored exactly or refused: all damage is detected, and costs at most one checkpoint."""

import json
import logging
import os
import random
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gptjax import checkpoint
from gptjax.checkpoint import Checkpoints, fingerprints
from gptjax.errors import UserError
from gptjax.training.step import TrainState


def make_state(scale: float = 1.0) -> TrainState:
    params = {
        "blocks": {"q": {"kernel": scale * jax.random.normal(jax.random.key(1), (2, 8, 12))}},
        "half": jnp.arange(7, dtype=jnp.bfloat16) * scale,
        "flag": jnp.array([True, False]),
    }
    tx = optax.masked(optax.adamw(1e-3), {"blocks": True, "half": True, "flag": False})
    return TrainState.create(params, tx=tx, key=jax.random.key(3)).replace(step=jnp.int32(scale))


def bitwise_equal(a, b) -> bool:
    def raw(leaf):
        return np.asarray(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)

    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        raw(x).dtype == raw(y).dtype and raw(x).tobytes() == raw(y).tobytes() for x, y in pairs
    )


ABSTRACT = jax.eval_shape(make_state)


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    checkpoints = Checkpoints(folder)
    checkpoints.save(1, make_state(1.0), {"n": 1})
    checkpoints.save(2, make_state(2.0), {"n": 2})
    return folder


@pytest.fixture
def steps(two_steps, tmp_path) -> Path:
    """A copy of the checkpoints of steps 1 and 2, which the test may damage."""
    return Path(shutil.copytree(two_steps, tmp_path / "checkpoints"))


def files_of(step: Path) -> list[Path]:
    return sorted(path for path in step.rglob("*") if path.is_file())


def falls_back(folder: Path) -> None:
    lines: list[str] = []
    restored = Checkpoints(folder, log=lines.append).restore(ABSTRACT)
    assert (
        restored is not None
        and restored.step == 1
        and restored.meta == {"n": 1}
        and bitwise_equal(restored.state, make_state(1.0))
    )
    assert str(folder / "2") in lines[0] and "step 1" in lines[-1]
    assert not (folder / "2").exists() and (folder / "corrupt-2").exists()


def test_what_is_restored_is_what_was_saved_bit_for_bit(steps):
    restored = Checkpoints(steps, log=pytest.fail).restore(ABSTRACT)
    assert restored.step == 2 and restored.meta == {"n": 2}
    assert bitwise_equal(restored.state, make_state(2.0))


def test_a_step_is_read_without_knowing_its_tree(steps):
    state = Checkpoints(steps).read(1)
    assert bitwise_equal(state["params"], make_state(1.0).params)
    assert np.array_equal(state["key"], jax.random.key_data(jax.random.key(3)))
    (steps / "1" / "meta.json").write_bytes(b"{}")
    with pytest.raises(UserError, match="is damaged"):
        Checkpoints(steps).read(1)


def test_no_step_at_all_is_a_fresh_start(tmp_path):
    assert Checkpoints(tmp_path / "absent").restore(ABSTRACT) is None
    (tmp_path / ".partial-5").mkdir()  # left by a run that was killed while writing its first checkpoint
    assert Checkpoints(tmp_path).restore(ABSTRACT) is None


# ---------------------------------------------------------------- damage


def test_one_flipped_bit_in_any_file_is_noticed(steps):
    draw = random.Random(0)
    for path in files_of(steps / "2"):
        whole = path.read_bytes()
        for _ in range(8):
            bit = draw.randrange(8 * len(whole))
            damaged = bytearray(whole)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            assert Checkpoints(steps).newest() == (1, {"n": 1}), (path, bit)
        path.write_bytes(whole)
    assert Checkpoints(steps).newest() == (2, {"n": 2})


def mutate(path: Path, how: str) -> None:
    whole = path.read_bytes()
    if how == "deleted":
        path.unlink()
    else:
        path.write_bytes({"half": whole[: len(whole) // 2], "empty": b"", "zeros": bytes(len(whole))}[how])


@pytest.mark.parametrize("how", ["half", "empty", "zeros", "deleted"])
def test_a_broken_file_is_noticed(two_steps, tmp_path, how):
    for i, path in enumerate(files_of(two_steps / "2")):
        folder = Path(shutil.copytree(two_steps, tmp_path / str(i)))
        mutate(folder / path.relative_to(two_steps), how)
        assert Checkpoints(folder).newest() == (1, {"n": 1}), path


@pytest.mark.parametrize("name", ["manifest.json", "meta.json", "state/manifest.ocdbt"])
def test_the_step_before_is_taken_with_a_warning(steps, name):
    path = steps / "2" / name
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 16
    path.write_bytes(damaged)
    falls_back(steps)


@pytest.mark.slow
def test_what_was_damaged_before_it_was_hashed_is_noticed_by_its_fingerprint(two_steps, tmp_path):
    """The arrays are damaged and the manifest is recomputed; Orbax reads them, but the fingerprint differs."""
    draw, refused = random.Random(1), 0
    data = [path for path in files_of(two_steps / "2") if path.parent.name == "d"]
    for i in range(12):
        folder = Path(shutil.copytree(two_steps, tmp_path / str(i)))
        path = folder / draw.choice(data).relative_to(two_steps)
        damaged = bytearray(path.read_bytes())
        bit = draw.randrange(8 * len(damaged))
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        checkpoint._write_json(folder / "2" / "manifest.json", checkpoint._manifest(folder / "2"))
        restored = Checkpoints(folder, log=lambda line: None).restore(ABSTRACT)
        assert restored.step == 1 or bitwise_equal(restored.state, make_state(2.0))
        refused += restored.step == 1
    assert refused > 0


def sign(step: Path) -> None:
    """Write a manifest that matches the files as they are."""
    checkpoint._write_json(step / "manifest.json", checkpoint._manifest(step))


def change_meta(step: Path, change) -> None:
    body = json.loads((step / "meta.json").read_text())
    change(body)
    checkpoint._write_json(step / "meta.json", body)
    sign(step)


def test_a_step_under_another_number_is_not_taken(steps):
    (steps / "2").rename(steps / "3")
    shutil.copytree(steps / "1", steps / "2")
    lines: list[str] = []
    assert Checkpoints(steps, log=lines.append).restore(ABSTRACT).step == 1
    assert "it is of step 2, but its folder is 3" in lines[0] and "of step 1" in lines[1]


def test_a_step_of_an_older_release_says_its_number_by_its_state(tmp_path):
    checkpoints = Checkpoints(tmp_path, log=pytest.fail)
    for step in (1, 2):
        checkpoints.save(step, make_state(float(step)).replace(step=jnp.int32(step)), {"n": step})
        change_meta(tmp_path / str(step), lambda body: body.pop("step"))
    assert checkpoints.restore(ABSTRACT).step == 2
    (tmp_path / "2").rename(tmp_path / "7")
    lines: list[str] = []
    assert Checkpoints(tmp_path, log=lines.append).restore(ABSTRACT).step == 1
    assert "it contains step 2, but its folder is 7" in lines[0]


def hostile(value):
    """Yield the JSON value with one member removed, or replaced by another type."""
    if isinstance(value, dict):
        for key in value:
            yield {name: member for name, member in value.items() if name != key}
            yield from ({**value, key: other} for other in hostile(value[key]))
    yield from (None, 5, "x", [1], {}, {"x": {}}, 10**400)


def test_a_hostile_meta_under_a_good_manifest_is_damage_or_refused(steps):
    body = json.loads((steps / "2" / "meta.json").read_text())
    body["leaves"] = {name: body["leaves"][name] for name in ("key", "params/half")}
    wanted, impls = checkpoint._plain(ABSTRACT)
    damaged = 0
    for other in hostile(body):
        try:
            stored = checkpoint._stored(other, 2)
        except checkpoint.Damaged:
            damaged += 1
            continue
        with pytest.raises(UserError, match="nothing in the checkpoint"):
            checkpoint._refuse_other_shapes(steps / "2", stored, wanted, impls)
    assert damaged > 60


@pytest.mark.parametrize("field", ["meta", "leaves", "keys", "step"])
def test_the_step_before_a_hostile_one_is_taken(steps, field):
    change_meta(steps / "2", lambda body: body.update({field: "x"}))
    with pytest.raises(UserError, match=f"expected .* at {field}"):
        Checkpoints(steps).read(2)
    falls_back(steps)


def test_a_numbered_folder_is_not_a_step(steps):
    (steps / "2").rename(steps / "keep")
    (steps / "2").mkdir()
    falls_back(steps)


@pytest.mark.skipif(os.name == "nt", reason="symbolic links need a privilege there")
def test_a_link_is_not_a_step(steps):
    (steps / "2").rename(steps / "elsewhere")
    (steps / "2").symlink_to(steps / "elsewhere")
    assert Checkpoints(steps).newest() == (1, {"n": 1})


def test_strangers_do_no_harm(steps):
    (steps / "2" / ".DS_Store").write_bytes(b"x")
    (steps / "notes.txt").write_text("x")
    (steps / "tmp").mkdir()
    assert Checkpoints(steps, log=pytest.fail).restore(ABSTRACT).step == 2


def test_nothing_readable_is_never_a_fresh_start(steps):
    for step in ("1", "2"):
        (steps / step / "manifest.json").unlink()
    before = sorted(os.listdir(steps))
    for _ in range(2):
        with pytest.raises(UserError, match="no checkpoint can be read.*\n.*another run_dir"):
            Checkpoints(steps, log=lambda line: None).restore(ABSTRACT)
        assert sorted(os.listdir(steps)) == before
    for step in ("1", "2"):
        (steps / step).rename(steps / f"corrupt-{step}")
    with pytest.raises(UserError, match="no checkpoint can be read"):
        Checkpoints(steps).restore(ABSTRACT)


# ---------------------------------------------------------------- another model


def test_another_shape_or_dtype_is_refused_with_the_difference(steps):
    def other():
        state = make_state()
        params = dict(state.params, half=jnp.zeros(7, jnp.float32), flag=jnp.zeros(3, bool), more=jnp.zeros(1))
        return state.replace(params=params, key=jax.random.key(0, impl="rbg"))

    with pytest.raises(UserError) as error:
        Checkpoints(steps, log=pytest.fail).restore(jax.eval_shape(other))
    text = str(error.value).replace("threefry2x32", "fry")
    assert "params/half: bfloat16[7] in the checkpoint, float32[7] expected" in text
    assert "params/flag: bool[2] in the checkpoint, bool[3] expected" in text
    assert "params/more: nothing in the checkpoint, float32[1] expected" in text
    assert "key: uint32[2] (fry key) in the checkpoint, uint32[4] (rbg key) expected" in text
    assert sorted(os.listdir(steps)) == ["1", "2"]


def test_the_caller_can_refuse_by_the_meta(steps):
    def refuse(meta):
        raise UserError(f"not {meta['n']}")

    with pytest.raises(UserError, match="not 2"):
        Checkpoints(steps).restore(ABSTRACT, refuse)


# ---------------------------------------------------------------- old steps


def test_two_whole_steps_stay_and_damaged_ones_do_not_count(tmp_path):
    checkpoints, state = Checkpoints(tmp_path, keep=1), make_state()
    for step in (1, 2, 3):
        checkpoints.save(step, state, {})
    assert checkpoints.steps() == [2, 3]
    (tmp_path / "3" / "meta.json").write_text("{}")
    reopened = Checkpoints(tmp_path, keep=2)
    reopened.save(4, state, {})
    assert reopened.steps() == [2, 3, 4]  # 2 is still needed: 3 is damaged
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("moment", ["_orbax_save", "_write_json", "_manifest", "_sync_tree", "rename", "_collect"])
def test_killed_while_saving(steps, monkeypatch, moment):
    """After a kill at any moment the newest complete step is restored, and the next save cleans up."""

    def die(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", lambda *args, **kwargs: None)  # a killed process does not clean up
        if moment == "rename":
            patch.setattr(checkpoint.os, "rename", die)
        else:
            patch.setattr(Checkpoints if moment == "_collect" else checkpoint, moment, die)
        with pytest.raises(KeyboardInterrupt):
            Checkpoints(steps).save(3, make_state(3.0), {"n": 3})
    newest = 3 if moment == "_collect" else 2
    checkpoints = Checkpoints(steps, log=pytest.fail)
    restored = checkpoints.restore(ABSTRACT)
    assert restored.step == newest and bitwise_equal(restored.state, make_state(float(newest)))
    checkpoints.save(4, make_state(4.0), {})
    assert checkpoints.steps() == [newest, 4] and not list(steps.glob(".*"))


def test_killed_while_deleting(steps, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", lambda path, **kwargs: (Path(path) / "manifest.json").unlink())
        with pytest.raises(FileNotFoundError):
            Checkpoints(steps).save(3, make_state(3.0), {"n": 3})
    assert Checkpoints(steps).steps() == [2, 3] or Checkpoints(steps).steps() == [1, 2, 3]
    assert Checkpoints(steps, log=pytest.fail).restore(ABSTRACT).step in (2, 3)


# ---------------------------------------------------------------- the disk


def test_a_full_disk_is_one_clear_error_and_harms_nothing(steps):
    resource = pytest.importorskip("resource", reason="limits on the size of a file are a Unix thing")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpoints = Checkpoints(steps)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, hard))
    try:
        with pytest.raises(UserError, match=r"cannot write checkpoint .*3: File too large\n.*unharmed"):
            checkpoints.save(3, make_state(3.0), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(os.listdir(steps)) == ["1", "2"]
    assert Checkpoints(steps).newest() == (2, {"n": 2})
    checkpoints.save(3, make_state(3.0), {})
    assert Checkpoints(steps).restore(ABSTRACT).step == 3


def test_what_orbax_had_begun_complains_to_nobody(caplog):
    levels = [logging.getLogger(name).level for name in ("absl", "asyncio")]
    with pytest.raises(OSError), checkpoint._quiet():
        logging.getLogger("asyncio").error("Future exception was never retrieved")
        raise OSError("full")
    assert not caplog.records
    assert [logging.getLogger(name).level for name in ("absl", "asyncio")] == levels


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write checkpoint"):
        Checkpoints(tmp_path / "file" / "checkpoints").save(1, make_state(), {})


# ---------------------------------------------------------------- fingerprints


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint32", "int8", "bool"])
def test_every_bit_counts(dtype):
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 2, 24).astype(bool) if dtype == "bool" else None
    array = jnp.asarray(raw if raw is not None else rng.normal(size=24) * 50).astype(dtype).reshape(2, 3, 4)
    mark = fingerprints({"x": array})["x"]
    whole = np.asarray(array)
    bits = range(0, 8 * whole.nbytes, 8) if dtype == "bool" else range(8 * whole.nbytes)
    flipped = []
    for bit in bits:
        damaged = bytearray(whole.tobytes())
        damaged[bit // 8] ^= 1 << bit % 8
        flipped.append(np.frombuffer(damaged, whole.dtype).reshape(whole.shape))
    marks = jax.jit(jax.vmap(checkpoint._fingerprint))(np.stack(flipped))
    assert mark not in marks.tolist()


def test_a_fingerprint_is_the_sum_it_says():
    x = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    index = np.arange(35, dtype=np.uint64)
    expected = int((x.view(np.uint32).ravel().astype(np.uint64) * (2 * index + 1)).sum() % 2**32)
    assert fingerprints({"x": jnp.asarray(x)}) == {"x": expected}
    assert fingerprints({"x": jnp.float32(1.5)}) == {"x": int(np.float32(1.5).view(np.uint32))}
    assert fingerprints({"x": jnp.zeros((0, 3))}) == {"x": 0}


def test_the_manifest_says_what_is_there(two_steps):
    manifest = json.loads((two_steps / "2" / "manifest.json").read_text())
    names = {path.relative_to(two_steps / "2").as_posix() for path in files_of(two_steps / "2")}
    assert set(manifest["files"]) == names - {"manifest.json"}
