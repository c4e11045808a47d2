"""convert --push: what reaches the hub, what stays here, and what is refused before any work."""

import logging
import shutil

import huggingface_hub
import jax.numpy as jnp
import pytest
from etils import epath
from huggingface_hub import constants

import dmpo_jax as dj
from dmpo_jax import diffusers_io
from dmpo_jax.export import hub as publishing
from dmpo_jax.export import model_card, record
from dmpo_jax.models.lora import Adapters
from dmpo_jax.toy.debug import write_tiny_pipeline
from tests.support.fake_hub import TOKEN, FakeHub
from tests.support.tiny import FAMILY

# Sockets of the hub client's connections, which it keeps.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),  # its own, of httpx
]


@pytest.fixture
def hub(monkeypatch):
    made = FakeHub()
    monkeypatch.setattr(constants, "ENDPOINT", made.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its own protocol, in Rust
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield made
    huggingface_hub.close_session()
    made.close()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A workdir with an export and a LoRA file, each with its card."""
    workdir = epath.Path(tmp_path_factory.mktemp("run"))
    write_tiny_pipeline(workdir / "model", FAMILY)
    write_tiny_pipeline(workdir / "export", FAMILY)
    record.write_record(workdir / "export", step=8, ema=False)
    adapters = Adapters(rank=2, targets=("to_q",), alpha=None, dropout=0.0, seed=0)
    lora = {"mid.to_q.lora_A.kernel": jnp.ones((4, 2)), "mid.to_q.lora_B.kernel": jnp.ones((2, 4))}
    diffusers_io.save_lora(lora, workdir / "lora", scale=1)
    card = model_card.Card(
        trained=model_card.Trained(str(workdir / "model"), None, adapters),
        objective="dmpo",
        pairs_per_update=8,
        ema_decay=0.0,
        pairs=(f"{workdir}/pairs=1",),
        settings={},
        workdir=workdir,
    )
    for name in ("export", "lora"):
        model_card.write_card(card, workdir / name, step=8, ema=False)
    return workdir


@pytest.fixture
def export(made, tmp_path):
    """A copy of the export, with files beside it that are no part of it."""
    shutil.copytree(made / "export", tmp_path / "out")
    (tmp_path / "out" / ".secret").write_text("x")
    (tmp_path / "out" / "notes.txt").write_text("x")
    (tmp_path / "out" / "unet" / ".secret").write_text("x")
    return tmp_path / "out"


def content(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_an_export_reaches_a_new_private_repository(hub, export, caplog):
    with caplog.at_level(logging.INFO):
        address = dj.convert(out=export, push="lab/tuned")
    assert address == f"{hub.endpoint}/lab/tuned"
    assert hub.repositories["lab/tuned"]["private"]
    assert caplog.messages[-1].endswith("which is private; its settings there make it public")
    sent, here = dict(hub.files("lab/tuned")), content(export)
    card = sent.pop("README.md").decode()
    assert 'from_pretrained("lab/tuned")' in card
    assert card == here.pop("README.md").decode().replace("THIS_FOLDER", "lab/tuned")
    assert here.keys() - sent.keys() == {".secret", "notes.txt", "unet/.secret", "export.json"}
    assert sent == {name: here[name] for name in sent}


def test_a_second_push_replaces_the_weights_and_nothing_else(hub, made, export):
    keeps = {"unet/diffusion_pytorch_model.fp16.safetensors": b"x", "other.safetensors": b"x"}
    cut = {f"unet/diffusion_pytorch_model-0000{i}-of-00002.safetensors": b"" for i in (1, 2)}
    cut["unet/diffusion_pytorch_model.safetensors.index.json"] = b"{}"
    hub.repositories["me/tuned"] = {"private": False, "files": {**keeps, **cut}}
    dj.convert(out=export, push="me/tuned")
    files = hub.files("me/tuned")
    assert not hub.repositories["me/tuned"]["private"]
    assert not cut.keys() & files.keys()
    assert keeps.items() <= files.items()
    assert ("POST", "/api/repos/create") not in hub.asked
    dj.convert(out=made / "lora", push="me/tuned")
    assert hub.files("me/tuned").keys() == files.keys() | {diffusers_io.LORA_FILE}
    assert b'load_lora_weights("me/tuned")' in hub.files("me/tuned")["README.md"]


def test_a_dry_run_asks_the_hub_nothing(hub, export, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    dj.convert(out=export, push="lab/tuned", push_dry_run=True)
    said = capsys.readouterr().out
    assert not hub.asked
    size = (export / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert f"unet/diffusion_pytorch_model.safetensors  {size:>14,}\n" in said
    assert 'from_pretrained("lab/tuned")' in said
    assert "secret" not in said


def test_a_failed_upload_leaves_the_export_and_says_how_to_send_it_again(hub, export):
    hub.refuses = "POST .*/commit/main"
    before = content(export)
    with pytest.raises(ValueError, match="refused by the test") as raised:
        dj.convert(out=export, push="me/tuned")
    assert f"dmpo-jax convert --out={export} --push=me/tuned" in str(raised.value)
    assert content(export).items() >= before.items()
    assert hub.files("me/tuned") == {}
    hub.refuses = "(?!)"
    dj.convert(out=export, push="me/tuned")
    assert "model_index.json" in hub.files("me/tuned")


def test_a_login_that_fails_is_told_before_the_export(hub, tmp_path, monkeypatch):
    def push(name="me/tuned", **changes):
        # The checkpoint does not exist: to get as far as that is to have begun the export.
        dj.convert(checkpoint=tmp_path / "none", out=tmp_path / "out", push=name, **changes)

    with pytest.raises(ValueError, match="me is logged in, who may write to me, lab, not to other"):
        push("other/tuned")
    hub.account["auth"]["accessToken"]["role"] = "fineGrained"
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        push("other/tuned")
    hub.account["auth"]["accessToken"]["role"] = "read"
    with pytest.raises(ValueError, match="'test' may only read: log in with `hf auth login`"):
        push()
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(ValueError, match=r"does not accept the login .*Invalid user token.*HF_TOK"):
        push()
    monkeypatch.setattr(huggingface_hub.HfApi, "whoami", no_token)
    with pytest.raises(ValueError, match="needs a login of the hub: log in with `hf auth login`"):
        push()
    assert {path for _, path in hub.asked} == {"/api/whoami-v2"}


def no_token(self):
    raise huggingface_hub.errors.LocalTokenNotFoundError


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"push": "tuned"}, "must be a hub repository, ORG/NAME, but got 'tuned': the user or"),
        ({"push": "me/tuned@main"}, "but got 'me/tuned@main': Repo id must use alphanumeric"),
        ({"push": "me/a/b"}, "but got 'me/a/b': Repo id must be in the form"),
        ({"push_dry_run": True, "checkpoint": "x"}, r"add --push=ORG/NAME"),
        ({"push": "me/x", "single_file": "x"}, "not what --single_file makes"),
        ({"push": "me/x", "out": "memory://x"}, "--push sends a local folder"),
        ({"push": "me/x", "out": "none"}, "none holds no export with a model card of this package"),
    ],
)
def test_refusals(hub, options, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=words):
        dj.convert(**{"out": "x", **options})
    assert {path for _, path in hub.asked} <= {"/api/whoami-v2"}
    assert not list(tmp_path.iterdir())


def test_only_complete_exports_are_packed(made, export):
    publishing.pack(export, "me/tuned")
    outside = export.parent / "passwords"
    outside.write_text("x")
    (export / "vae" / "more.json").symlink_to(outside)
    with pytest.raises(ValueError, match=r"more\.json is a link to .*passwords, outside of"):
        publishing.pack(export, "me/tuned")
    shutil.rmtree(export / "vae")
    with pytest.raises(ValueError, match=r"is incomplete: model_index\.json names vae"):
        publishing.pack(export, "me/tuned")
    shutil.copy(made / "lora" / diffusers_io.LORA_FILE, export)
    with pytest.raises(ValueError, match=r"either a pipeline .* but holds both"):
        publishing.pack(export, "me/tuned")
    (export / "README.md").write_text("---\ntags:\n- other\n---\n- dmpo_jax\n")
    with pytest.raises(ValueError, match="holds no export with a model card of this package"):
        publishing.pack(export, "me/tuned")
