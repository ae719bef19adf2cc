"""Hugging Face's Trainer: real ones, on tiny models built from a config."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path

import pytest
import torch
import transformers
from helpers import Positions, evenly, hooks_of, pickled, weights, zero_gradients
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

    def build(*callbacks, model=None, trainer=Trainer, out="run", **options):
        own = {name: options.pop(name) for name in OWN if name in options}
        options = {**DEFAULTS, "learning_rate": LR, **options}
        args = transformers.TrainingArguments(str(tmp_path / out), **options)
        if "model_init" not in own:
            own["model"] = bert() if model is None else model
        return trainer(args=args, train_dataset=DATA, callbacks=[*callbacks], **own)

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


def test_the_decay_makes_adamw(train):  # P3, P4
    theirs = train(**ADAMW)
    for wd, options in (
        (0.1, ADAM),
        (0.1, {**ADAM, "weight_decay": 0.3}),
        (None, {**ADAM, "weight_decay": 0.1}),
        (0.1, {"optim": "adamw_torch", "weight_decay": 0.3}),
    ):
        assert same(train(DecoupledWD(wd, quantum=0), **options), theirs)
    assert not same(train(DecoupledWD(0.05, quantum=0), **ADAM), theirs)


LIKE_ADAMW = {
    "accumulation": {"gradient_accumulation_steps": 3},
    "clipping": {"max_grad_norm": 0.05},
    "bf16": {"bf16": True},
    "cosine": {"lr_scheduler_type": "cosine", "warmup_steps": 3},
}


@pytest.mark.parametrize("options", LIKE_ADAMW.values(), ids=LIKE_ADAMW)
def test_adam_equals_adamw(options, train):  # P1, P4
    ours = train(DecoupledWD(0.1, quantum=0), **ADAM, **options)
    assert same(ours, train(**ADAMW, **options))


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


GROUPS = {  # callbacks, options, and the coefficient of each group
    "of the Trainer": ([], {}, [0.2, 0]),
    "with a weight decay": ([], {"weight_decay": 0.1}, [0.2, 0]),
    "frozen later": ([Freezes()], {}, [0.2, 0]),
    "by names of the user's own": ([], {"trainer": OwnNames}, [0.2, 0]),
    "with a third one": ([], {"trainer": AddsGroup}, [0.2, 0, 0.2]),
}


@pytest.mark.parametrize(("callbacks", "options", "expected"), GROUPS.values(), ids=GROUPS)
def test_the_second_group_of_the_trainer_does_not_decay(callbacks, options, expected, train):  # wd
    decay = DecoupledWD(0.2)
    trainer = train(*callbacks, decay, max_steps=1, **options)
    assert [row.coefficient for row in decay.describe()] == expected
    names = {name for name, _ in trainer.model.named_parameters()}
    rows = {row.name for row in decay.describe(parameters=True) if row.reason == "no-decay group"}
    assert rows == names - set(trainer.get_decay_parameter_names(trainer.model))


def test_other_groups_decay(build):  # wd
    for options in ({}, {"weight_decay": 0.1}):
        decay = DecoupledWD([0.2, 0.1])
        trainer = build(decay, max_steps=1, **options)
        trainer.train()
        assert all(row.decays for row in decay.describe(parameters=True))
    model = bert()
    vectors = [p for p in model.parameters() if p.ndim < 2]
    matrices = {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1}
    own = torch.optim.AdamW([matrices, {"params": vectors, "weight_decay": 0.05}], lr=LR)
    decay = DecoupledWD(0.2)
    build(decay, model=model, optimizers=(own, None), max_steps=1).train()
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
    before = weights(model)
    zero_gradients(model)
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
    schedule = Positions(0.1)
    callback = DecoupledWD(schedule)
    trainer = train(callback, **options)
    assert trainer.state.global_step == steps
    assert schedule.last(steps) == evenly(steps)
    assert callback.describe()[0].steps_per_epoch == epoch


@pytest.mark.parametrize("options", [{"max_steps": 0}, {"num_train_epochs": 0}], ids=str)
def test_a_run_without_a_length(options, train):  # P6
    assert same(train(DecoupledWD(Normalized(0.0)), **ADAM, **options), train(**ADAM, **options))


HALVES = {"*classifier*": Linear(0.2, 0), "*": 0.1}
SCALES = {"wd": [0.2, 0.2], "scale_by": ["lr", "none"]}
NAMES = {  # with a weight decay of 0.3 in the first group of two
    "a number": (DecoupledWD(0.1), {"wd": [0.1, 0.1]}),
    "a schedule": (DecoupledWD(Linear(0.2, 0)), {"wd": [0.2, 0.1]}),
    "args.weight_decay": (DecoupledWD(), {"wd": [0.3, 0.3]}),
    "alike": (DecoupledWD([0.1, 0.1]), {"wd": [0.1, 0.1]}),
    "unlike": (DecoupledWD([0.1, 0.2]), {"wd/pg1": [0.1, 0.1], "wd/pg2": [0.2, 0.2]}),
    "other scales": (DecoupledWD(**SCALES), {"wd/pg1": [0.2, 0.2], "wd/pg2": [0.2, 0.2]}),
    "a mapping": (DecoupledWD(HALVES), {"wd/*classifier*": [0.2, 0.1], "wd/*": [0.1, 0.1]}),
}


@pytest.mark.parametrize(("callback", "expected"), NAMES.values(), ids=NAMES)
def test_names_in_the_logs(callback, expected, train):  # P13
    trainer = train(copy.deepcopy(callback), max_steps=2, weight_decay=0.3, **ADAM)
    assert logged(trainer) == {name: pytest.approx(values) for name, values in expected.items()}


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


class SaveNow(TrainerCallback):
    """Asks for a checkpoint of its own after step 3."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = control.should_save or state.global_step == 3


DEFERS = functools.partial(DecoupledWD, wd=Cosine(0.4, 0), quantum=1.3e-2)
SAVES = {"save_strategy": "steps", "save_steps": 3}
RARELY = {"save_strategy": "steps", "save_steps": 100}
RESTORES = {"restore_callback_states_from_checkpoint": True}
BEST = {"save_strategy": "best", "metric_for_best_model": "loss", **TO_EVALUATE}
INITIAL = {"anchor": "initial"}
RESUMED = {  # arguments, callbacks beside the decay, and when the Trainer saves
    "a schedule": ({}, [], SAVES),
    "initial": (INITIAL, [], SAVES | RESTORES),
    "anchors": ({"anchor": {"classifier.weight": torch.ones(2, 8)}}, [], SAVES),
    "lr_ratio": ({"scale_by": "lr_ratio", "quantum": 0.73}, [], SAVES),
    "keys": ({"wd": {"classifier*": 0.4, lambda name, p: True: 0.3}}, [], SAVES),  # files sort them
    "epochs": ({}, [], {"save_strategy": "epoch"}),
    "best": (INITIAL, [], BEST),
    "by a callback": (INITIAL, [SaveNow()], RARELY),
}
resumes = pytest.mark.skipif(
    not hasattr(torch.compiler, "set_stance"), reason="transformers resumes with torch 2.6 or later"
)


@resumes
@pytest.mark.parametrize(("own", "callbacks", "options"), RESUMED.values(), ids=RESUMED)
def test_a_resumed_run_ends_with_the_same_bits(own, callbacks, options, train, tmp_path):  # P9, P15
    whole = train(DEFERS(**own), *callbacks, **options)
    folder = min((tmp_path / "run").iterdir())
    assert (folder / ANCHORS_FILE).exists() is (own == INITIAL)
    state = json.loads((folder / "trainer_state.json").read_text())
    assert state["global_step"] < STEPS
    saved = state["stateful_callbacks"].pop(STATE_KEY)
    assert any(log for row in saved["owed"] for log in row)  # something is deferred
    resumed = train(DEFERS(**own), resume=str(folder), out="another", **options)
    assert same(resumed, whole)
    assert logged(resumed) == logged(whole)
    (folder / "trainer_state.json").write_text(json.dumps(state))
    with pytest.warns(DecoupledWDWarning, match=r"saved after \d steps without it"):
        assert not same(train(DEFERS(**own), resume=str(folder), **options), whole)


@resumes
def test_joining_a_run(train, tmp_path):  # P9
    options = SAVES | RESTORES
    train(**options)
    with pytest.warns(DecoupledWDWarning, match="saved after 3 steps without it"):
        joined = train(DEFERS(), resume=str(tmp_path / "run/checkpoint-3"), **options)
    again = train(DEFERS(), resume=str(tmp_path / "run/checkpoint-6"), **options)
    assert same(again, joined)
    train(resume=str(tmp_path / "run/checkpoint-6"), **options)  # and leaving it


OTHERS = {  # arguments of the resumed run, its options, what warnings name, the last coefficient
    "wd and length": ({"wd": Linear(0.4, 0)}, {"max_steps": 10}, ["max_steps", "wd"], 0.04),
    "anchor": ({"wd": Linear(0.2, 0), **INITIAL}, {}, ["anchor"], 0.025),
}


@resumes
@pytest.mark.parametrize(("own", "options", "names", "last"), OTHERS.values(), ids=OTHERS)
def test_other_arguments_win_and_warn(own, options, names, last, train, tmp_path):  # P9
    train(DecoupledWD(Linear(0.2, 0)), **SAVES)
    changed = DecoupledWD(**own)
    with pytest.warns(DecoupledWDWarning) as caught:
        train(changed, resume=str(tmp_path / "run/checkpoint-3"), **options)
    texts = sorted(str(it.message) for it in caught if it.category is DecoupledWDWarning)
    assert [text.partition(" was ")[0] for text in texts] == names
    assert changed.coefficients[0] == pytest.approx(last)


def test_the_optimizer_is_as_it_was(train):  # P3
    seen = []

    class Groups(TrainerCallback):
        def on_optimizer_step(self, args, state, control, optimizer, **kwargs):
            seen.append([[*sorted(g), g["weight_decay"]] for g in optimizer.param_groups])

    pair = train(DecoupledWD(0.1), Groups(), weight_decay=0.3), train(Groups(), weight_decay=0.3)
    assert seen[:STEPS] == seen[STEPS:]
    ours, theirs = (len(hooks_of(trainer.optimizer.optimizer)) for trainer in pair)
    assert ours == theirs


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

    options = {"trainer": OutOfMemory, "auto_find_batch_size": True, "max_steps": 4}
    schedule = Positions(0.1)
    ours = train(DecoupledWD(schedule, quantum=0), **ADAM, **options)
    assert same(ours, train(**ADAMW, **options))
    assert schedule.last(4) == evenly(4)


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
    callback.note = "of a subclass"
    train(callback, max_steps=1)
    for copied in (pickled(callback), copy.deepcopy(callback)):
        train(copied, max_steps=1)
        assert (repr(copied), copied.coefficients) == (repr(callback), callback.coefficients)
        assert copied.note == "of a subclass"
