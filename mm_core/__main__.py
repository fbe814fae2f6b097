"""Without ComfyUI: `generate` makes a video of photos and a prompt, `doctor` lists the model files that are here,
`plan` tells what the published models need of a graphics card."""

from __future__ import annotations

import argparse
import sys
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from .choices import (
    AS_MODEL,
    ATTENTIONS,
    DRAFT,
    OFFLOADING,
    PRECISIONS,
    QUANTISED,
    SCHEDULERS,
    STEP_CACHES,
    TINY,
    VIDEO_FORMATS,
)
from .errors import MagicMirrorError, exit_code
from .faces.packs import INSIGHTFACE
from .files import DOWNLOADS, ENCODED, atomic_write, numbered_name

if TYPE_CHECKING:
    from torch import Tensor

    from .pipelines.base import BaseModel
    from .pipelines.clip import ClipSettings
    from .pipelines.control import AdapterSettings
    from .pipelines.identity import Identity
    from .pipelines.lora import Lora
    from .pipelines.magic_mirror import MagicMirror


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    return exit_code(lambda: args.run(args))


def generate(args: argparse.Namespace) -> None:
    """Check everything that can be checked, look at the photos, and only then load the base model.

    Of several processes (torchrun, accelerate launch) each makes its share of the clips, or its part of every clip.
    """
    from accelerate import PartialState
    from torch import accelerator

    from .faces.analysis import FaceAnalyzer
    from .faces.packs import download_pack
    from .faces.references import analyse_references, check_number, check_weights
    from .picture_file import read_image
    from .pipelines.control import AdapterSettings
    from .pipelines.magic_mirror import MagicMirror

    wanted = list(product(args.prompt, args.seed))
    outputs = _outputs(args.output, len(wanted))
    check_number(len(args.reference))
    if args.weights:
        check_weights(args.weights, len(args.reference))
    processes = PartialState(cpu=not accelerator.is_available())
    model = MagicMirror(
        _base(args), adapter=args.adapter, id_encoder=_id_encoder(args), precision=args.precision, offload=args.offload,
        attention=args.attention, compile=args.compile, cache=ENCODED, context_parallel=args.context_parallel,
        device=processes.device if processes.num_processes > 1 else None,
    )  # fmt: skip
    clips = [_clip_settings(args, model.base, prompt, seed) for prompt, seed in wanted]
    settings = AdapterSettings(
        identity_scale=args.identity_scale,
        can_scale=args.can_scale,
        ip_scale=args.ip_scale,
        start=args.start,
        end=args.end,
    )
    cautions = [line for clip in clips for line in model.checks.cautions(clip, model.checks.of_prompt(clip, settings))]
    loras = [_lora(text, model.base) for text in args.lora]
    print(model.status, *(f"warning: {line}" for line in dict.fromkeys(cautions)), sep="\n")
    images = [read_image(path) for path in args.reference]
    if args.download:
        with processes.local_main_process_first():
            download_pack(args.insightface_root, args.face_pack)
    analyzer = FaceAnalyzer(args.insightface_root, args.face_pack, fetch="add --download")
    which = int(args.face) if args.face.isdigit() else args.face
    names = [path.name for path in args.reference]
    identity = model.identity(analyse_references(analyzer, images, which=which, names=names, weights=args.weights))
    print(identity.report)
    own = slice(None) if args.context_parallel else slice(processes.process_index, None, processes.num_processes)
    for clip, output in list(zip(clips, outputs, strict=True))[own]:
        latents = _sample(model, clip, identity, settings, loras)
        if processes.is_main_process or not args.context_parallel:
            _write(model, latents, output)
    if processes.num_processes > 1:
        processes.wait_for_everyone()
        processes.destroy_process_group()


def _outputs(output: Path, clips: int) -> list[Path]:
    """The files of the clips, after a look at what was asked for: numbered where there are several."""
    if output.suffix[1:] not in VIDEO_FORMATS:
        raise MagicMirrorError(f"The output is {output.name}; its ending must be one of {', '.join(VIDEO_FORMATS)}.")
    if not output.absolute().parent.is_dir():
        raise MagicMirrorError(f"The folder {output.absolute().parent} of the output does not exist; make it first.")
    if output.is_dir():
        raise MagicMirrorError(f"The output {output} is a folder; give a file in it, or another name.")
    if clips == 1:
        return [output]
    return [output.with_name(numbered_name(output.stem, number + 1, output.suffix)) for number in range(clips)]


def _sample(
    model: MagicMirror, clip: ClipSettings, identity: Identity, settings: AdapterSettings, loras: list[Lora]
) -> Tensor:
    from tqdm import tqdm

    plan = model.plan_line(clip, identity)
    if plan is not None:
        print(plan)
    with tqdm(total=clip.steps, unit="step") as bar:
        return model.sample(clip, identity, settings, on_step=lambda *_: bar.update(), loras=loras)


def _write(model: MagicMirror, latents: Tensor, output: Path) -> None:
    from .video import write_video

    try:
        result = model.decode(latents)
        write_video(output, result.frames, result.fps, format=output.suffix[1:])
    except Exception as error:  # whatever it is, the sampled clip must not go with it
        path = _save_latents(latents, output)
        raise MagicMirrorError(f"{error} The sampled clip is kept, as latents, in {path}.") from error
    print(output.absolute())


def _lora(text: str, base: BaseModel) -> Lora:
    """FILE or FILE:STRENGTH, which says how many layers it changes."""
    from .pipelines.lora import Lora

    name, _, end = text.rpartition(":")
    try:
        path, strength = Path(name), float(end)
    except ValueError:  # no number behind a colon: Windows has colons in paths too
        path, strength = Path(text), 1.0
    lora = Lora.open(path, strength, base)
    print(f"{lora.file.path.name}: {len(lora.file.keys)} layers, strength {lora.strength:g}")
    return lora


def _clip_settings(args: argparse.Namespace, base: BaseModel, prompt: str, seed: int) -> ClipSettings:
    from .pipelines.clip import ClipSettings

    return ClipSettings.of_model(
        base.limits,
        base.sampling,
        prompt=prompt,
        negative_prompt=args.negative_prompt,
        width=args.width,
        height=args.height,
        num_frames=args.frames,
        steps=args.steps,
        guidance_scale=args.guidance,
        dynamic_guidance=args.scheduler == "dpm",
        scheduler=args.scheduler,
        step_cache=args.step_cache,
        seed=seed,
    )


def plan(args: argparse.Namespace) -> None:
    """Print what the published models need on cards of some sizes."""
    from .pipelines.plan import table

    print(table())


def doctor(args: argparse.Namespace) -> None:
    """Print what is found where `generate` looks, or in ComfyUI's folders."""
    from tqdm import tqdm

    from .doctor import add_hashes, convert, find_models, report, verdict
    from .folders import Folders

    if args.models is None:
        folders = Folders(base_models=(DOWNLOADS,), photomaker=(DOWNLOADS,), faces=(args.insightface_root,))
    elif args.models.is_dir():
        folders = Folders.in_comfyui(args.models)
    else:
        raise MagicMirrorError(f"There is no folder {args.models}; give ComfyUI's models folder.")
    if args.convert:
        print(convert(folders))
    findings = find_models(folders)
    if args.check_hashes:
        with tqdm(total=sum(finding.size for finding in findings), unit="B", unit_scale=True) as bar:
            findings = add_hashes(findings, lambda done: bar.update(done - bar.n))
    print(verdict(findings), report(findings), sep="\n")


def _base(args: argparse.Namespace) -> BaseModel:
    """The base model that `--base` names: tiny, a folder, a file, or a model on the hub."""
    from .pipelines.base import download_folder
    from .pipelines.named import base_of, folder_of
    from .pipelines.presets import published
    from .pipelines.single_file import FileBase

    path = Path(args.base)
    parts = {"--text-encoder": args.text_encoder, "--vae": args.vae, "--tokenizer": args.tokenizer}
    given = [name for name, value in parts.items() if value]
    if args.base != TINY and path.is_file():
        if len(given) < len(parts):
            missing = ", ".join(name for name in parts if name not in given)
            raise MagicMirrorError(f"{path.name} holds the transformer only: give {missing} too.")
        return FileBase(
            transformer=path, text_encoder=args.text_encoder, vae=args.vae, tokenizer_folder=args.tokenizer
        )
    if given:
        raise MagicMirrorError(
            f"{given[0]} is {parts[given[0]]}, but the base is {args.base}: only one that is a single file takes it. "
            "Leave it out."
        )
    if args.download and (preset := published(args.base)) is not None:
        download_folder(preset.repo, folder_of(args.base))
    return base_of(args.base, "add --download")


def _id_encoder(args: argparse.Namespace) -> Path | None:
    from .checkpoints.photomaker import REPO, download_id_encoder
    from .pipelines.named import id_encoder_for

    if args.id_encoder or args.base == TINY:
        return args.id_encoder
    path = id_encoder_for(args.base)
    if path.is_file():
        return path
    if args.download:
        return download_id_encoder(DOWNLOADS)
    raise MagicMirrorError(
        f"There is no {path}. Add --download to fetch it from https://huggingface.co/{REPO}, or give --id-encoder."
    )


def _save_latents(latents: Tensor, output: Path) -> Path:
    from safetensors.torch import save_file

    path = output.with_suffix(".latents.safetensors")
    with atomic_write(path) as temporary:
        save_file({"latents": latents.contiguous()}, temporary)
    return path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mm_core", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    show_defaults = argparse.ArgumentDefaultsHelpFormatter
    _generate_arguments(commands.add_parser("generate", help="make a video of a person", formatter_class=show_defaults))
    _doctor_arguments(commands.add_parser("doctor", help="list the model files", formatter_class=show_defaults))
    described = dict(help="what the published models need on cards of some sizes", formatter_class=show_defaults)
    commands.add_parser("plan", **described).set_defaults(run=plan)
    return parser


def _doctor_arguments(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=doctor)
    add = command.add_argument
    add("--models", type=Path, help="ComfyUI's models folder; without it, where generate puts what it downloads")
    add("--insightface-root", type=Path, default=INSIGHTFACE, help="without --models: holds models/<pack>/*.onnx")
    add("--check-hashes", action="store_true", help="read every file and show its SHA-256; takes minutes")
    add("--convert", action="store_true", help="write photomaker-v2.safetensors beside photomaker-v2.bin, a pickle")


def _generate_arguments(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=generate)
    add = command.add_argument
    add("--reference", type=Path, nargs="+", required=True, help="photos of one person")
    add("--weights", type=float, nargs="+", help="how much each photo counts, 0 to 100; 0 leaves it out")
    add("--prompt", nargs="+", required=True, help='names the person by a word, or marks one: "a man img reading"')
    add("--output", type=Path, required=True, help="the video: .mp4, .webm, .webp or .gif; several are numbered")
    add("--negative-prompt", default="")
    add("--base", default=TINY, help="tiny (built in), a diffusers folder, a .safetensors file, or a published name")
    add("--text-encoder", type=Path, help="with a file as base: T5 encoder file")
    add("--vae", type=Path, help="with a file as base: VAE file")
    add("--tokenizer", type=Path, help="with a file as base: folder of the T5 tokenizer")
    add("--adapter", type=Path, help="adapter file; tiny brings its own")
    add("--lora", nargs="+", default=[], metavar="FILE[:STRENGTH]", help="LoRAs trained on the base, strength 1")
    add("--id-encoder", type=Path, help="photomaker-v2.bin; tiny brings its own")
    add("--insightface-root", type=Path, default=INSIGHTFACE, help="holds models/<pack>/*.onnx")
    add("--face-pack", default="buffalo_l", help="insightface model pack")
    add("--face", default="largest", help="which: largest, leftmost, rightmost, or its number from the left, from 0")
    add("--download", action="store_true", help="allow to download models that are missing")
    own = "default: the model's own"
    add("--width", type=int, default=0, help=f"pixels, {own}")
    add("--height", type=int, default=0, help=f"pixels, {own}")
    add("--frames", type=int, default=0, help=f"1, or 8N + 1 (CogVideoX 1.5: 16N + 1), {own}")
    add("--steps", type=int, default=0, help=own)
    add("--guidance", type=float, default=0.0, help=f"classifier-free guidance, 1 is off, {own}")
    add("--scheduler", default=AS_MODEL, choices=(AS_MODEL, DRAFT, *SCHEDULERS), help=own)
    add("--step-cache", default=STEP_CACHES[0], choices=STEP_CACHES, help="reuse much of a step in the next one")
    add("--seed", type=int, nargs="+", default=[0], help="each prompt with each seed is a clip")
    add("--identity-scale", type=float, default=1.0, help="strength of the text fusion, 0 to 3")
    add("--can-scale", type=float, default=1.0, help="strength of CAN, 0 to 3")
    add("--ip-scale", type=float, default=1.0, help="strength of the cross-attention, 0 to 3")
    add("--start", type=float, default=0.0, help="part of the schedule where the identity sets in, 0 to 1")
    add("--end", type=float, default=1.0, help="part of the schedule where it stops")
    stored = "; ".join(f"{name} needs {' and '.join(packages)}" for name, packages in QUANTISED.items())
    add("--precision", default="auto", choices=PRECISIONS, help=stored)
    add("--offload", default="auto", choices=OFFLOADING)
    add("--attention", default=ATTENTIONS[0], choices=ATTENTIONS, help="kernel of the transformer's attention")
    add("--compile", action="store_true", help="compile the transformer's blocks; the first clip takes minutes longer")
    add("--context-parallel", action="store_true", help="under torchrun: all processes share each clip")


if __name__ == "__main__":
    sys.exit(main())
