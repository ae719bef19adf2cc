"""Hugging Face's Trainer: real ones, on tiny models built from a config."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path

import pytest
import torch
import transformers
from helpers import pickled
from helpers import same as same_weights
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback
from transformers.trainer_callback import DefaultFlowCallback
from transformers.trainer_utils import default_compute_objective

from wd_callbacks.core.warn import DecoupledWDWarning
from wd_callbacks.schedules import Cosine, Linear, Normalized
from wd_callbacks.transformers import ANCHORS_FILE, STATE_KEY, DecoupledWD

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

LR, STEPS = 1e-2, 8  # of two epochs of 16 samples
ADAM = {"optimizer_cls_and_kwargs": (torch.optim.Adam, {"lr": LR})}
ADAMW = {"optim": "adamw_torch", "weight_decay": 0.1}  # the default is the fused one
SIZES = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CONFIG = BertConfig(vocab_size=16, max_position_embeddings=8, **SIZES, **DROPOUT)
DATA = [{"input_ids": torch.arange(i, i + 6) % 16, "labels": i % 2} for i in range(16)]


def bert():
    """A model, with the same weights at every call."""
    torch.manual_seed(0)
    return BertForSequenceClassification(CONFIG)


DEFAULTS = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "logging_steps": 1}
DEFAULTS |= {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
OWN = ("optimizer_cls_and_kwargs", "optimizers", "model_init", "eval_dataset")
TO_EVALUATE = {"eval_strategy": "epoch", "eval_dataset": DATA[:4]}


@pytest.fixture
def build(tmp_path):
    """Returns a Trainer; options that it does not know go to its TrainingArguments."""

    def build(*callbacks, model=None, trainer=Trainer, data=DATA, out="run", **options):
        own = {name: options.pop(name) for name in OWN if name in options}
        make = options.pop("args", transformers.TrainingArguments)
        args = make(str(tmp_path / out), learning_rate=LR, **{**DEFAULTS, **options})
        if "model_init" not in own:
            own["model"] = bert() if model is None else model
        return trainer(args=args, train_dataset=data, callbacks=[*callbacks], **own)

    return build


@pytest.fixture
def train(build):
    """Trains, and returns the Trainer."""

    def train(*callbacks, resume=None, **options):
        built = build(*callbacks, **options)
        built.train(resume_from_checkpoint=resume)
        return built

    return train


def same(ours, theirs):
    return same_weights(ours.model, theirs.model)


def logged(trainer):
    """What was logged under names that begin with wd, by name."""
    logs = [(k, v) for log in trainer.state.log_history for k, v in log.items()]
    return {name: [v for k, v in logs if k == name] for name, _ in logs if name[:2] == "wd"}


LIKE_ADAMW = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 3},
    "max_steps": {"max_steps": 5},
    "clipping": {"max_grad_norm": 0.05},
    "bf16": {"bf16": True},
    "cosine": {"lr_scheduler_type": "cosine", "warmup_steps": 3},
    "own weight decay": {"weight_decay": 0.3},
}


@pytest.mark.parametrize("options", LIKE_ADAMW.values(), ids=LIKE_ADAMW)
def test_adam_equals_adamw(options, train):  # P3, P4
    options = {"num_train_epochs": 1, **options}
    theirs = train(**{**options, **ADAMW})
    assert same(train(DecoupledWD(0.1, quantum=0), **ADAM, **options), theirs)
    if len(options) == 1:
        assert same(train(DecoupledWD(quantum=0), **ADAM, weight_decay=0.1, **options), theirs)
        assert not same(train(DecoupledWD(0.05, quantum=0), **ADAM, **options), theirs)


@pytest.mark.parametrize("wd", [0.0, 0.1], ids="weight_decay={}".format)
def test_the_second_group_does_not_decay(wd, train):  # wd
    callback = DecoupledWD(0.2)
    trainer = train(callback, weight_decay=wd, max_steps=1)
    decaying = set(trainer.get_decay_parameter_names(trainer.model))
    rows = callback.describe(parameters=True)
    assert {row.name for row in rows if row.decays} == decaying
    assert {row.reason for row in rows if not row.decays} == {"no-decay group"}
    sequence = DecoupledWD([0.2, 0.1])
    trainer = train(sequence, weight_decay=wd, max_steps=1)
    assert all(row.decays for row in sequence.describe(parameters=True))


class Freezes(TrainerCallback):
    def on_train_begin(self, args, state, control, model, **kwargs):
        model.bert.embeddings.requires_grad_(False)


class OwnNames(Trainer):
    def get_decay_parameter_names(self, model):
        return [name for name, p in model.named_parameters() if "classifier" not in name]


class AddsGroup(Trainer):
    def create_optimizer(self, *args):
        optimizer = super().create_optimizer(*args)
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})
        return optimizer


@pytest.mark.parametrize(("callbacks", "trainer"), [((Freezes(),), Trainer), ((), OwnNames)])
def test_the_second_group_is_the_trainers_own(callbacks, trainer, train):  # wd
    decay = DecoupledWD(0.2)
    trained = train(*callbacks, decay, trainer=trainer, max_steps=1)
    names = set(trained.get_decay_parameter_names(trained.model))
    spared = {row.name for row in decay.describe(parameters=True) if row.reason == "no-decay group"}
    assert spared == {name for name, _ in trained.model.named_parameters()} - names


def test_a_third_group_changes_nothing_for_the_first_two(train):  # wd
    decay = DecoupledWD(0.2)
    trained = train(decay, trainer=AddsGroup, max_steps=1)
    assert len(trained.optimizer.param_groups) == 3
    assert [row.coefficient for row in decay.describe()] == [0.2, 0, 0.2]


def test_groups_of_the_users_own_are_not_the_trainers(train):  # wd
    model = bert()
    vectors = [p for p in model.parameters() if p.ndim < 2]
    matrices = {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1}
    own = torch.optim.AdamW([matrices, {"params": vectors, "weight_decay": 0.05}], lr=LR)
    decay = DecoupledWD(0.2)
    train(decay, model=model, optimizers=(own, None), max_steps=1)
    assert [row.coefficient for row in decay.describe()] == [0.2, 0.2]


@pytest.mark.parametrize("event", ["on_epoch_begin", "on_step_end"])
def test_added_in_training_it_is_refused(event, build):  # P10
    adds, trainer = TrainerCallback(), build()
    setattr(adds, event, lambda *args, **kwargs: trainer.add_callback(DecoupledWD(0.1)))
    trainer.add_callback(adds)
    with pytest.raises(ValueError, match=r"added to a Trainer in training.*before train\(\)"):
        trainer.train()


def test_callbacks_around_it_miss_nothing(build):
    class MyFlow(DefaultFlowCallback):
        pass

    class Begins(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            begun.append(self)

    begun, first, last = [], Begins(), Begins()
    trainer = build(first, DecoupledWD(0.1, quantum=0), last, **ADAM)
    trainer.remove_callback(DefaultFlowCallback)
    trainer.add_callback(MyFlow())
    trainer.train()
    assert begun == [first, last]
    assert logged(trainer) == {"wd": [0.1] * STEPS}


def test_a_subclass(train):
    class Mine(DecoupledWD):
        def on_train_begin(self, *args, **kwargs):
            self.begun = True
            super().on_train_begin(*args, **kwargs)

    callback = Mine(0.1, quantum=0)
    assert same(train(callback, **ADAM), train(**ADAMW))
    assert copy.deepcopy(callback).begun


@pytest.mark.parametrize("cautious", [False, True])
def test_a_step_that_raised_leaves_nothing_to_later_steps(cautious, build):  # P3, P16
    class Raises(torch.optim.SGD):
        raises = True

        def step(self, closure=None):
            if self.raises:
                raise RuntimeError("out of luck")
            return super().step(closure)

    model = bert()
    optimizer = Raises(model.parameters(), lr=LR, weight_decay=0.25)
    trainer = build(DecoupledWD(1.0, cautious=cautious), model=model, optimizers=(optimizer, None))
    with pytest.raises(RuntimeError, match="out of luck"):
        trainer.train()
    optimizer.raises = False
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()  # by hand, after training: L2 of 0.25
    for p, old in zip(model.parameters(), before):
        torch.testing.assert_close(p.detach(), old - LR * (0.25 * old))


LENGTHS = {
    "epochs": ({}, 8, 4),
    "accumulation": ({"gradient_accumulation_steps": 3}, 4, 2),
    "max_steps": ({"max_steps": 5}, 5, 4),
}


@pytest.mark.parametrize(("options", "steps", "epoch"), LENGTHS.values(), ids=LENGTHS)
def test_a_schedule_runs_from_0_to_1(options, steps, epoch, train):  # P6, P7
    seen = []
    callback = DecoupledWD(lambda progress: seen.append(progress) or 0.1)
    trainer = train(callback, **options)
    assert seen[-trainer.state.max_steps :] == [step / steps for step in range(steps)]
    assert callback.describe()[0].steps_per_epoch == epoch


@pytest.mark.parametrize("options", [{"max_steps": 0}, {"num_train_epochs": 0}], ids=str)
def test_a_run_without_a_length(options, train):  # P6
    assert same(train(DecoupledWD(Normalized(0.0)), **ADAM, **options), train(**ADAM, **options))


def split(model):
    """An optimizer with two param groups, and no scheduler."""
    head = list(model.classifier.parameters())
    body = [p for p in model.parameters() if all(p is not q for q in head)]
    return torch.optim.Adam([{"params": body}, {"params": head}], lr=LR), None


HALVES = {"*classifier*": Linear(0.2, 0), "*": 0.1}
TWO = {"wd/pg1": [0.2, 0.2], "wd/pg2": [0.2, 0.2]}
NAMES = {
    "a number": (DecoupledWD(0.1), False, {"wd": [0.1, 0.1]}),
    "a schedule": (DecoupledWD(Linear(0.2, 0)), False, {"wd": [0.2, 0.1]}),
    "args.weight_decay": (DecoupledWD(), False, {"wd": [0.3, 0.3]}),
    "alike": (DecoupledWD([0.1, 0.1]), True, {"wd": [0.1, 0.1]}),
    "unlike": (DecoupledWD([0.1, 0.2]), True, {"wd/pg1": [0.1, 0.1], "wd/pg2": [0.2, 0.2]}),
    "other scales": (DecoupledWD(0.2, scale_by=["lr", "none"]), True, TWO),
    "a mapping": (DecoupledWD(HALVES), False, {"wd/*classifier*": [0.2, 0.1], "wd/*": [0.1, 0.1]}),
}


@pytest.mark.parametrize(("callback", "is_split", "expected"), NAMES.values(), ids=NAMES)
def test_names_in_the_logs(callback, is_split, expected, train):  # P13
    model = bert()
    own = {"optimizers": split(model)} if is_split else ADAM
    trainer = train(copy.deepcopy(callback), model=model, max_steps=2, weight_decay=0.3, **own)
    assert logged(trainer) == {name: pytest.approx(values) for name, values in expected.items()}


def test_each_training_logs(build):  # P13
    trainer = build(DecoupledWD(0.1), max_steps=2, logging_steps=2)
    for _ in range(2):
        trainer.train()
        assert logged(trainer) == {"wd": [0.1]}


@pytest.mark.parametrize("disable_tqdm", [True, False])
def test_the_console_shows_it(disable_tqdm, train, capsys):  # P7, P13
    callback = DecoupledWD(Cosine(0.125, 0), verbose=True)
    with pytest.raises(ValueError, match="before training has started"):
        callback.describe()
    train(callback, max_steps=1, disable_tqdm=disable_tqdm)
    out = capsys.readouterr().out
    assert "'wd': '0.125'" in out
    assert out.count("applied of due") == 1
    assert callback.coefficients == [0.125, 0.0]


def test_tensorboard_shows_it(train, tmp_path, monkeypatch):  # P13
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    train(DecoupledWD(Linear(0.5, 0)), max_steps=4, logging_steps=2, report_to="tensorboard")
    scalars = events.EventAccumulator(str(tmp_path / "board")).Reload().Scalars("train/wd")
    assert [(scalar.step, scalar.value) for scalar in scalars] == [(2, 0.375), (4, 0.125)]


DEFERS = functools.partial(DecoupledWD, wd=Cosine(0.4, 0), quantum=1.1e-2)
RESUMED = {  # arguments, and whether the Trainer restores its callbacks
    "deferred": ({}, False),
    "restored": ({}, True),
    "initial": ({"anchor": "initial"}, True),
    "mapping": ({"anchor": {"classifier.weight": torch.ones(2, 8)}}, False),
    "lr_ratio": ({"scale_by": "lr_ratio", "quantum": 0.73}, False),
    "keys": ({"wd": {"classifier*": 0.4, lambda name, p: True: 0.3}}, False),  # files sort them
}
resumes = pytest.mark.skipif(
    not hasattr(torch.compiler, "set_stance"), reason="transformers resumes with torch 2.6 or later"
)
SAVES = {"save_strategy": "steps", "save_steps": 3}


@resumes
@pytest.mark.parametrize(("own", "restores"), RESUMED.values(), ids=RESUMED)
def test_a_resumed_run_ends_with_the_same_bits(own, restores, train, tmp_path):  # P9, P15
    whole = train(DEFERS(**own), **SAVES)
    folder = tmp_path / "run" / "checkpoint-3"
    assert (folder / ANCHORS_FILE).exists() is (own.get("anchor") == "initial")
    saved = json.loads((folder / "trainer_state.json").read_text())["stateful_callbacks"]
    assert any(log for row in saved[STATE_KEY]["owed"] for log in row)  # something is deferred
    flag = {"restore_callback_states_from_checkpoint": restores}
    resumed = train(DEFERS(**own), resume=str(folder), out="another", **flag, **SAVES)
    assert same(resumed, whole)
    assert logged(resumed) == logged(whole)
    state = json.loads((folder / "trainer_state.json").read_text())
    del state["stateful_callbacks"][STATE_KEY]
    (folder / "trainer_state.json").write_text(json.dumps(state))
    with pytest.warns(DecoupledWDWarning, match="saved after 3 steps without it"):
        assert not same(train(DEFERS(**own), resume=str(folder), **flag), whole)


@resumes
@pytest.mark.parametrize("strategy", ["epoch", "best"])
def test_every_way_to_save(strategy, train, tmp_path):  # P9
    options = {"save_strategy": strategy, "metric_for_best_model": "loss", **TO_EVALUATE}
    whole = train(DEFERS(), num_train_epochs=3, **options)
    resumed = train(DEFERS(), num_train_epochs=3, resume=str(tmp_path / "run/checkpoint-4"))
    assert same(resumed, whole)
    assert logged(resumed) == logged(whole)


@resumes
class SaveNow(TrainerCallback):
    """Asks for a checkpoint of its own after step 3."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = control.should_save or state.global_step == 3


@resumes
@pytest.mark.parametrize("own", [{}, {"anchor": "initial"}], ids=["deferred", "initial"])
@pytest.mark.parametrize("steps", [2, 100])
def test_a_callback_may_ask_for_a_checkpoint(own, steps, train, tmp_path):  # P9
    whole = train(DEFERS(**own), SaveNow(), save_strategy="steps", save_steps=steps)
    resumed = train(DEFERS(**own), resume=tmp_path / "run/checkpoint-3", out="another")
    assert same(resumed, whole)


@resumes
def test_an_anchor_that_is_new_in_a_resumed_run(train, tmp_path):  # P9
    train(DEFERS(), **SAVES)
    with pytest.warns(DecoupledWDWarning, match="anchor was None in the saved run and is initial"):
        train(DEFERS(anchor="initial"), resume=str(tmp_path / "run/checkpoint-3"))


@resumes
def test_joining_a_run(train, tmp_path):  # P9
    train(**SAVES)
    checkpoint, flag = str(tmp_path / "run/checkpoint-3"), "restore_callback_states_from_checkpoint"
    with pytest.warns(DecoupledWDWarning, match="saved after 3 steps without it"):
        joined = train(DEFERS(), resume=checkpoint, **SAVES, **{flag: True})
    again = train(DEFERS(), resume=str(tmp_path / "run/checkpoint-6"), **SAVES, **{flag: True})
    assert same(again, joined)
    train(resume=str(tmp_path / "run/checkpoint-6"), **{flag: True})  # and leaving it


@resumes
def test_other_arguments_win_and_warn(train, tmp_path):  # P9
    train(DecoupledWD(Linear(0.2, 0)), **SAVES)
    with pytest.warns(DecoupledWDWarning) as caught:
        changed = DecoupledWD(Linear(0.4, 0))
        train(changed, resume=str(tmp_path / "run" / "checkpoint-3"), max_steps=10)
    texts = sorted(str(it.message) for it in caught if it.category is DecoupledWDWarning)
    assert [text.partition(" was ")[0] for text in texts] == ["max_steps", "wd"]
    assert changed.coefficients[0] == pytest.approx(0.04)


def test_the_optimizer_is_as_it_was(train):  # P3
    seen = []

    class Groups(TrainerCallback):
        def on_optimizer_step(self, args, state, control, optimizer, **kwargs):
            seen.append([[*sorted(g), g["weight_decay"]] for g in optimizer.param_groups])

    pair = train(DecoupledWD(0.1), Groups(), weight_decay=0.3), train(Groups(), weight_decay=0.3)
    assert seen[:STEPS] == seen[STEPS:]
    for name, hooks in vars(pair[0].optimizer.optimizer).items():
        if name.endswith("_hooks"):
            assert len(hooks) == len(getattr(pair[1].optimizer.optimizer, name)), name


@pytest.mark.parametrize("fails", [False, True], ids="fails={}".format)
def test_training_twice(fails, build):  # P3, P4, P6
    class Fails(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise RuntimeError("out of luck")

    ours, theirs = build(DecoupledWD(0.1, quantum=0), **ADAM), build(**ADAMW)
    for trainer in (ours, theirs):
        if fails:
            trainer.add_callback(Fails)
            with pytest.raises(RuntimeError, match="out of luck"):
                trainer.train()
            trainer.remove_callback(Fails)
        else:
            trainer.train()
        trainer.train()
    assert same(ours, theirs)
    assert logged(ours) == {"wd": [0.1] * STEPS}


def test_finding_the_batch_size(train):  # P4, P6
    class OutOfMemory(Trainer):
        def training_step(self, model, inputs, *args, **kwargs):
            if len(inputs["labels"]) > 3:
                raise RuntimeError("CUDA out of memory.")
            return super().training_step(model, inputs, *args, **kwargs)

    options, seen = {"trainer": OutOfMemory, "auto_find_batch_size": True, "max_steps": 4}, []
    callback = DecoupledWD(lambda progress: seen.append(progress) or 0.1, quantum=0)
    assert same(train(callback, **ADAM, **options), train(**ADAMW, **options))
    assert seen[-4:] == [0.0, 0.25, 0.5, 0.75]


def test_searching_hyperparameters(build):  # P9, P13: evaluation metrics stay as they are
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    callback = DecoupledWD(anchor="initial")
    options = {**TO_EVALUATE, "num_train_epochs": 1, "logging_steps": 100, "save_strategy": "epoch"}
    trainer = build(callback, model_init=bert, **options)
    seen = []

    def space(trial):
        return {"weight_decay": trial.suggest_categorical("weight_decay", [0.1, 0.2])}

    def objective(metrics):
        seen.append((trainer.args.weight_decay, callback.coefficients[0]))
        assert default_compute_objective(metrics) == metrics["eval_loss"]
        return metrics["eval_loss"]

    sampler = optuna.samplers.GridSampler({"weight_decay": [0.1, 0.2]}, seed=0)
    trainer.hyperparameter_search(space, objective, 2, backend="optuna", sampler=sampler)
    assert set(seen) == {(0.1, 0.1), (0.2, 0.2)}
    folders = list(Path(trainer.args.output_dir).glob("run-*/checkpoint-*"))
    assert len(folders) == 2
    assert all((folder / ANCHORS_FILE).is_file() for folder in folders)


def test_a_seq2seq_trainer(train):  # P4
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 16}
    config = transformers.T5Config(dropout_rate=0.0, decoder_start_token_id=0, **sizes)
    data = [{**it, "labels": it["input_ids"]} for it in DATA]

    def run(*callbacks, **options):
        torch.manual_seed(0)
        options |= {"args": transformers.Seq2SeqTrainingArguments, "data": data}
        model = transformers.T5ForConditionalGeneration(config)
        trainer = transformers.Seq2SeqTrainer
        return train(*callbacks, model=model, trainer=trainer, max_steps=3, **options)

    assert same(run(DecoupledWD(0.1, quantum=0), optim="adamw_torch"), run(**ADAMW))


def test_lora(train):  # P2, P4
    peft = pytest.importorskip("peft")

    def lora():
        torch.manual_seed(1)
        return peft.get_peft_model(bert(), peft.LoraConfig(target_modules=["query"]))

    callback = DecoupledWD({"*lora_A*": 0.1, "*lora_B*": 0.1}, quantum=0)
    ours = train(callback, model=lora(), max_steps=3, **ADAM)
    assert same(ours, train(model=lora(), max_steps=3, **ADAMW))
    assert sum(row.decays for row in callback.describe(parameters=True)) == 2


def test_copies_take_the_arguments_along(train):  # P9
    callback = DecoupledWD(Cosine(0.1, 0), exclude="bias", anchor="initial")
    train(callback, max_steps=1)
    for copied in (pickled(callback), copy.deepcopy(callback)):
        train(copied, max_steps=1)
        assert (repr(copied), copied.coefficients) == (repr(callback), callback.coefficients)
