"""Configuration: files, overrides, refusals that name key and value, exact reruns."""

from pathlib import Path

import pytest

from llama import config
from llama.cli import UserError
from llama.config import Config

CONFIGS = Path(__file__).parent.parent / "configs"


def _run_configs() -> list[Path]:
    return sorted(p for p in CONFIGS.glob("*.yaml") if p.name != "tokenizer.yaml")


@pytest.mark.parametrize("path", _run_configs(), ids=lambda p: p.stem)
def test_every_shipped_config_loads_and_reruns_itself(path: Path, tmp_path: Path) -> None:
    cfg = config.load(["--config", str(path)])
    saved = tmp_path / "config.yaml"
    saved.write_text(config.to_yaml(cfg))
    assert config.load(["--config", str(saved)]) == cfg


def test_later_files_and_options_win(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("model: {dim: 64, n_heads: 2}\noptim: {lr: 1e-4}\n")
    (tmp_path / "b.yaml").write_text("model: {dim: 128}\n")
    argv = ["--config", str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.yaml")]
    cfg = config.load([*argv, "--optim.lr", "2e-4", "--train.tokens", "1.4T"])
    assert (cfg.model.dim, cfg.model.n_heads, cfg.optim.lr) == (128, 2, 2e-4)
    assert cfg.train.tokens == 1_400_000_000_000


def test_mixture_is_read_beside_the_file_that_names_it(tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "mix.yaml").write_text("a: 0.25\nb: 0.75\n")
    (folder / "run.yaml").write_text("data: {mixture: mix.yaml}\n")
    monkeypatch.chdir(tmp_path)
    run = ["--config", "configs/run.yaml"]
    assert config.load(run).data.mixture == {"a": 0.25, "b": 0.75}
    (tmp_path / "other.yaml").write_text("c: 1\n")
    assert config.load([*run, "--data.mixture", "other.yaml"]).data.mixture == {"c": 1.0}
    assert config.load([*run, "--data.mixture", '{"d": 1.0}']).data.mixture == {"d": 1.0}


def test_a_mixture_in_a_file_replaces_the_default(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("data:\n  mixture: {mine: 1.0}\n")
    assert config.load(["--config", str(tmp_path / "run.yaml")]).data.mixture == {"mine": 1.0}


REFUSED = [
    ("--model.dmi 3", "did you mean model.dim"),
    ("--model.dim -8", "model.dim is -8"),
    ("--model.dim 0", "model.dim is 0"),
    ("--model.n_heads 5", "model.dim 192 / model.n_heads 5"),
    ("--model.n_kv_heads 4", "model.n_kv_heads 4 does not divide"),
    ("--train.batch_tokens 1000", "train.batch_tokens 1000 is not a multiple"),
    ("--train.batch_ramp [[100,3]]", "train.batch_ramp 100 is not a multiple"),
    ("--train.tokens lots", "train.tokens.*lots"),
    ("--train.tokens=-4M", "train.tokens is -4000000"),
    ("--train.micro_batch 0", "train.micro_batch is 0"),
    ("--train.dtype float16", "train.dtype.*float16"),
    ("--optim.lr nan", "optim.lr.*nan"),
    ("--optim.min_lr_ratio 1.5", "optim.min_lr_ratio is 1.5"),
    ("--optim.betas [0.9,1.0]", "optim.betas.1 is 1.0"),
    ("--optim.warmup_steps -1", "optim.warmup_steps is -1"),
    ('--model.rope_scaling {"type":"yarn"}', "rope_scaling.type is 'yarn'"),
    ('--model.rope_scaling {"type":"linear"}', "linear has exactly"),
    ('--model.rope_scaling {"type":"linear","factor":0}', "rope_scaling.factor is 0"),
    ("--parallel.shard 0", "parallel.shard is 0"),
    ("--parallel.replicate -1", "parallel.replicate and parallel.shard are -1"),
    ("--checkpoint.keep 0", "checkpoint.keep is 0"),
    ("--name ../x", "name is '../x'"),
    ("--config nothing.yaml", "nothing.yaml cannot be read"),
    ("--data.mixture nothing.yaml", "nothing.yaml cannot be read"),
]


@pytest.mark.parametrize(("argv", "sentence"), REFUSED, ids=[r[0] for r in REFUSED])
def test_refused_with_key_and_value(argv: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        config.load(argv.split())
    assert "\n" not in str(caught.value)


BAD_FILES = [
    ("model: [", "x.yaml is not readable YAML"),
    ("model: {dim: 1, dim: 2}", "the key 'dim' twice"),
    ("model: {dmi: 3}", "did you mean model.dim"),
    ("modle: {dim: 3}", "modle"),
    ("model: {dim: wide}", "model.dim.*wide"),
    ("data: {mixture: {a: 0.5, b: 0.6}}", "sum to 1.1"),
    ("data: {mixture: {a: 1.5, b: -0.5}}", "weight of b is -0.5"),
    ("", "holds no keys"),
    ("model: null", "model is None, expected its keys"),
    ("model: [1]", r"model is \[1\], expected its keys"),
    ("model: {n_layers: 1000000000}", "model.n_layers is 1000000000, expected .* at most 10000"),
    (f"name: {'x' * 300}", "200 bytes"),
    (f"seed: 1{'0' * 99}", "seed is 10*, expected 0 or more, below"),
]


def test_files_that_other_options_name_are_read_as_strictly(tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_text("lr: 0.1\nlr: 0.2\n")
    (tmp_path / "a.yaml").write_text("optim: b.yaml\n")
    with pytest.raises(UserError, match="b.yaml.*line 2 gives the key 'lr' twice"):
        config.load(["--config", str(tmp_path / "a.yaml")])
    with pytest.raises(UserError, match="b.yaml.*line 2 gives the key 'lr' twice"):
        config.load(["--optim", str(tmp_path / "b.yaml")])
    with pytest.raises(UserError, match="gives the key 'sigma' twice"):
        config.load(["--guard", "{sigma: 1, sigma: 2}"])
    (tmp_path / "c.yaml").write_text("config: d.yaml\n")
    with pytest.raises(UserError, match="config: d.yaml stands in a YAML"):
        config.load(["--config", str(tmp_path / "c.yaml")])
    (tmp_path / "b.yaml").write_text("lr: 0.1\n")
    assert config.load(["--config", str(tmp_path / "a.yaml")]).optim.lr == 0.1


@pytest.mark.parametrize(("text", "sentence"), BAD_FILES, ids=[b[0] for b in BAD_FILES])
def test_bad_files_are_refused(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=sentence):
        config.load(["--config", str(path)])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: 0.5\nb: 0.6\n", "sum to 1.1, expected 1"),
        ("a: half\n", "weight of a is 'half'"),
        ("a: 0\nb: 1\n", "weight of a is 0"),
        ("a: true\n", "weight of a is True"),
    ],
)
def test_bad_mixtures_are_refused_with_the_file(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "mix.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=sentence) as caught:
        config.read_mixture(path)
    assert "mix.yaml" in str(caught.value)


def test_total_steps_counts_the_ramp() -> None:
    cfg = Config().train
    cfg.tokens, cfg.batch_tokens = config.Count(1000), config.Count(100)
    assert config.total_steps(cfg) == 10
    cfg.tokens = config.Count(1001)
    assert config.total_steps(cfg) == 11
    cfg.tokens, cfg.batch_ramp = config.Count(1000), [(config.Count(50), 4)]
    assert config.total_steps(cfg) == 4 + 8
    cfg.batch_ramp = [(config.Count(50), 100)]
    assert config.total_steps(cfg) == 20


def test_differences_name_both_values() -> None:
    old, new = config.to_dict(Config()), config.to_dict(Config())
    new["optim"]["lr"] = 2e-3
    new["extra"] = 1
    assert config.differences(old, new) == ["optim.lr: 0.001 -> 0.002", "extra: None -> 1"]


def test_feed_forward_width_is_the_papers() -> None:
    widths = {4096: 11008, 5120: 13824, 6656: 17920, 8192: 22016, 2048: 5632}
    for dim, width in widths.items():
        assert config.ModelConfig(dim=dim).hidden_dim == width
