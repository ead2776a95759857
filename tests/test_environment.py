"""What a caller has set in PyTorch (modes, defaults) changes no result."""

import ast
from contextlib import contextmanager
from pathlib import Path

import attrs
import pytest
import torch
from support import backends
from support.backbones import EVALUATION
from support.registered import every, made, seeded
from support.teachers import CLASSES, GRID, RUNTIME, SIDE, recipe, tiny_teacher
from torch import nn

import spdfq
from spdfq.backends import Calibration, quantize
from spdfq.errors import ModelError
from spdfq.evaluation.evaluator import evaluator_for
from spdfq.losses import CrossEntropyLoss
from spdfq.quantized.checkpoint import load_quantized, save_quantized
from spdfq.recipe import ModelSpec
from spdfq.runtime import Runtime
from spdfq.synth import Moment
from spdfq.teacher import load_teacher


@contextmanager
def default(dtype, device="cpu"):
    """Other defaults of PyTorch. A tensor that lands on the meta device by mistake has no values to go on with."""
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


ENVIRONMENTS = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "grad_disabled": lambda: torch.set_grad_enabled(False),
    "deterministic": deterministic,
    "anomaly": torch.autograd.detect_anomaly,
    "bfloat16": lambda: default(torch.bfloat16),
    "float16": lambda: default(torch.float16),
    "float64": lambda: default(torch.float64),
    "meta": lambda: default(torch.float32, "meta"),
}
in_every_environment = pytest.mark.parametrize("environment", ENVIRONMENTS.values(), ids=ENVIRONMENTS)
STEPS = "quantization.steps=[{type='calibrate'}, {type='blockwise', iterations=2}, {type='distill', iterations=2}]"


def images(count=4):
    return torch.randn(count, 3, SIDE, SIDE, generator=seeded(), dtype=torch.float32, device="cpu")


def stages(before=tiny_teacher):
    """The images and logits of a small run."""
    teacher = before()
    made_images = recipe(iterations=3).synthesize(teacher, RUNTIME).images
    return made_images, quantize(teacher, made_images, backends.back_end(STEPS), RUNTIME)


@pytest.fixture(scope="module")
def ordinary():
    made_images, model = stages()
    return made_images, model(images()), model


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@in_every_environment
def test_images_and_quantized_models_are_the_same_in_every_environment(environment, ordinary):
    teacher = tiny_teacher()
    with environment():
        made_images, model = stages(lambda: teacher)
    assert torch.equal(made_images, ordinary[0])
    assert torch.equal(model(images()), ordinary[1])
    leaf = images().requires_grad_()  # nothing stayed behind that no gradient can pass
    assert torch.autograd.grad(model(leaf).sum(), leaf)[0].isfinite().all()


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@in_every_environment
def test_a_quantized_model_is_the_same_under_other_defaults_and_modes(environment, ordinary):
    model, x = ordinary[2], images()
    with environment():
        logits = model(x)
    if environment is ENVIRONMENTS["autocast"]:  # is the caller's wish here
        assert logits.dtype == torch.bfloat16
    else:
        assert torch.equal(logits, ordinary[1])


def test_an_image_made_under_inference_mode_can_be_quantized_on(ordinary):
    with torch.inference_mode():
        made_images = ordinary[0].clone()
    model = quantize(tiny_teacher(), made_images, backends.back_end(STEPS), RUNTIME)
    assert torch.equal(model(images()), ordinary[1])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_runtime_decides_the_precision_of_a_forward_pass(precision):
    x = images()
    with torch.autocast("cpu", dtype=torch.float16), Runtime(precision=precision).autocast():
        assert str((x @ x.mT).dtype) == f"torch.{precision}"


@pytest.mark.parametrize("name", ["autocast", "bfloat16", "float64", "inference_mode"])
def test_accuracy_is_measured_the_same_in_every_environment(name):
    spec = attrs.evolve(EVALUATION, bank=None, batch=20)
    teacher = load_teacher("bundled:vit_fmnist")
    evaluator = evaluator_for(teacher)
    with ENVIRONMENTS[name]():
        found = evaluator.reference(teacher, spec, RUNTIME).logits
    assert torch.equal(found, evaluator.reference(teacher, spec, RUNTIME).logits)


NAMES = ["bundled:vit_fmnist", ModelSpec(name="vit_tiny_patch16_224", img_size=32, pretrained=False)]


@pytest.mark.parametrize("spec", NAMES, ids=["bundled", "timm"])
def test_a_teacher_is_the_same_in_every_environment(spec):
    known = load_teacher(spec).fingerprint()
    for name in ("float64", "bfloat16", "meta", "inference_mode"):
        with ENVIRONMENTS[name]():
            teacher = load_teacher(spec)
        assert teacher.fingerprint() == known
        assert not any(parameter.is_inference() for parameter in teacher.module.parameters())
    assert torch.get_default_dtype() == torch.float32


def test_a_checkpoint_is_the_same_in_every_environment(tmp_path, ordinary):
    model, teacher = ordinary[2], tiny_teacher()
    for name in ("float64", "meta", "inference_mode"):
        with ENVIRONMENTS[name]():
            save_quantized(model, tmp_path / name, teacher)
            again = load_quantized(tmp_path / name, teacher.module)
        assert torch.equal(again(images()), ordinary[1])


# components under other defaults


def under(make):
    """What ``make`` returns under other defaults, after the same call without them."""
    usual = make()
    with default(torch.bfloat16, "meta"):
        return usual, make()


def same(first, second):
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and first.device == second.device and torch.equal(first, second)
    if attrs.has(type(first)):
        return same(attrs.asdict(first, recurse=False), attrs.asdict(second, recurse=False))
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


@every("prior")
def test_a_prior(name):
    assert same(*under(lambda: made("prior", name).sample(3, (4, 5), seeded())))


@every("sampler")
def test_a_sampler(name):
    def crops():
        plan = made("sampler", name).sample(3, (SIDE, SIDE), CLASSES, seeded())
        return plan, plan.views(x, (SIDE, SIDE)), plan.view_weights(3), plan.view_classes(3)

    x = images(3)
    assert same(*under(crops))


@every("target")
def test_a_target(name):
    if made("target", name).gives_labels:
        assert same(*under(lambda: made("target", name).sample([0, [1, 3], 2], CLASSES, seeded())))


@every("augmentation")
def test_an_augmentation(name):
    x, maps, moment = images(3), images(3)[:, :2, : GRID[0], : GRID[1]], Moment(count=3, size=(3, SIDE, SIDE))

    def changed():
        component = made("augmentation", name)
        change = component.draw(seeded(), moment)
        return change.apply(x), change.follow(maps, (SIDE, SIDE)) if component.followable else None

    assert same(*under(changed))


@every("loss")
def test_a_loss_and_its_gradient(name):
    loss = made("loss", name)
    if loss.needs_student:
        pytest.skip("student")
    losses = {"this": attrs.evolve(loss, weight=1.0)}
    if not loss.label_loss:
        losses["labels"] = CrossEntropyLoss()
    teacher, spec = (
        tiny_teacher(),
        recipe(iterations=2, images=2, losses=losses, sampler=made("sampler", "whole_image")),
    )
    assert same(*under(lambda: spec.synthesize(teacher, RUNTIME)))


@every("optimizer")
def test_an_optimizer(name):
    teacher, spec = tiny_teacher(), recipe(iterations=2, images=2, optimizer=made("optimizer", name))
    assert same(*under(lambda: spec.synthesize(teacher, RUNTIME).images))


@every("quantizer")
@pytest.mark.parametrize("observer", ["minmax", "grid_mse", "progressive", "percentile_mse"])
def test_a_quantizer_and_its_observer(name, observer):
    x = images().abs().flatten(2)

    def quantized():
        quantizer = made("quantizer", name, bits=4)
        quantizer.observe(x)
        quantizer.freeze(made("observer", observer))
        leaf = x.clone().requires_grad_()
        values = quantizer(leaf)
        return quantizer.tensors(), values.detach(), torch.autograd.grad(values.sum(), leaf)[0], quantizer.codes(x)

    assert same(*under(quantized))


@every("step")
def test_a_step(name):
    teacher, x = tiny_teacher(), images()

    def logits():
        step = made("step", name)
        step = attrs.evolve(step, iterations=2) if "iterations" in attrs.fields_dict(type(step)) else step
        placement = "psaq" if name in ("ptf", "norms") else "matmul_inputs"
        spec = backends.back_end(f"quantization.placement='{placement}'")
        if step.in_float:
            return quantize(teacher, x, attrs.evolve(spec, steps=(step, *spec.steps)), RUNTIME)(x).detach()
        model = quantize(teacher, x, spec, RUNTIME)
        step.run(model, Calibration(teacher=teacher, images=x, runtime=RUNTIME))
        return model(x).detach()

    assert same(*under(logits))


# gradient checkpointing


@pytest.mark.parametrize("flag", ["grad_checkpointing", "use_checkpoint"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_is_off_meanwhile(flag, reentrant, ordinary):
    made_images, model = stages(lambda: checkpointing(flag, reentrant))
    assert torch.equal(made_images, ordinary[0])
    assert torch.equal(model(images()), ordinary[1])


def test_gradient_checkpointing_stays_on_afterwards():
    teacher = checkpointing("grad_checkpointing", False)
    recipe(iterations=1).synthesize(teacher, RUNTIME)
    assert all(block.grad_checkpointing for block in teacher.module.blocks)


def test_gradient_checkpointing_under_an_unknown_name_is_refused_in_one_line():
    with pytest.raises(ModelError, match=r"^the model uses gradient checkpointing, .* turn it off") as caught:
        stages(lambda: checkpointing("remember_nothing", False))
    assert "\n" not in str(caught.value)


class Forgetful(nn.Module):
    """A block that is computed again in the backward pass while a flag is set."""

    def __init__(self, block, flag, reentrant):
        super().__init__()
        self.block, self.flag, self.reentrant = block, flag, reentrant
        setattr(self, flag, True)

    def forward(self, x):
        if getattr(self, self.flag):
            return torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=self.reentrant)
        return self.block(x)


def checkpointing(flag, reentrant):
    teacher = tiny_teacher()
    for index, block in enumerate(teacher.module.blocks):
        teacher.module.blocks[index] = Forgetful(block, flag, reentrant)
    return teacher


# the source


def test_every_new_tensor_names_its_device_and_its_dtype_where_torch_would_choose_one():
    decided_by_torch = {"zeros", "ones", "empty", "rand", "randn", "linspace", "eye", "fftfreq", "rfftfreq"}
    decided_by_values = {"arange", "full", "tensor", "as_tensor", "randint", "randperm"}
    missing = []
    for path in Path(spdfq.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            name = called.rpartition(".")[2]
            if called.startswith("torch.") and name in decided_by_torch | decided_by_values:
                given = {keyword.arg for keyword in node.keywords}
                if "device" not in given or (name in decided_by_torch and "dtype" not in given):
                    missing.append(f"{path.name}:{node.lineno} {called}")
    assert missing == []
