"""What stands in a directory without weights that are read, and what to do about it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import islice

from sinktrack.archive.names import known as step_of
from sinktrack.archive.storage.files import Files
from sinktrack.errors import ArchiveError

_MOST = 10_000
_NAMED = 3
_LOOKED = 20
_ADAPTER = "adapter_config.json"
_DEEPSPEED = re.compile(
    r"(?:mp_rank|(?:bf16_|fp16_)?zero_pp_rank|layer)_.*(?:model|optim)[^/]*_states\.pt"
)
_STATE = r"data_?loader|optimizer|scheduler|rng_state|random_states|scaler|sampler|training_args"
_KINDS = (
    (
        r"records\.jsonl",
        "a run of sinktrack itself ({found}); name the archive of checkpoints, and this as --run",
    ),
    (
        r"(?:[0-9]+_)?adapters\.safetensors",
        "adapters of MLX ({found}), which are not merged here; write the merged model with "
        "mlx_lm.fuse",
    ),
    (
        r"adapter_model\.(?:pt|pth|npz|ckpt)",
        "an adapter's weights in a file that PEFT does not load ({found}); save them with PEFT's "
        "save_pretrained",
    ),
    (
        r"adapter_(?:model.*|config\.json)",
        "adapters alone ({found}); give the model that they were trained on with --base (base), or "
        "merge them into it with PEFT's merge_and_unload and save that",
    ),
    (
        rf"global_step[0-9]+/|{_DEEPSPEED.pattern}|zero_to_fp32\.py",
        "DeepSpeed's state ({found}), a part for each process; write the weights with DeepSpeed's "
        "own zero_to_fp32.py --safe_serialization",
    ),
    (
        r".*\.(?:incomplete|part|partial|crdownload|aria2)|"
        r"(?:pytorch_|adapter_)?model.*\.(?:safetensors|bin)\.(?!index\.json|(?:zst|xz|gz|bz2)$|part).*",
        "a download or a copy that did not end ({found}); download or copy it again",
    ),
    (
        r"(?:model|pytorch_model)-[0-9]+-of-[0-9]+\.(?:safetensors|bin)",
        "shards ({found}) without their index; copy model.safetensors.index.json, or "
        "pytorch_model.bin.index.json, from where they come from",
    ),
    (
        r"(?:pytorch_)?model_fsdp(?:_[0-9]+)?_rank[0-9]+\.bin",
        "FSDP's local state ({found}), a file for each process; save with SHARDED_STATE_DICT",
    ),
    (
        r"consolidated\.[0-9]+\.pth|consolidated.*\.safetensors|params\.json",
        "a model in Meta's or Mistral's own layout ({found}); write it with the "
        "convert_llama_weights_to_hf.py or convert_mistral_weights_to_hf.py of transformers 4, or "
        "download the repository's files of Hugging Face's layout",
    ),
    (
        r"(?:hf_model|torchtune_model|recipe_state|meta_model)_?[0-9]*.*\.(?:pt|bin|safetensors)|"
        r"recipe_state/",
        "a checkpoint of torchtune ({found}); write it with its FullModelHFCheckpointer and "
        "safe_serialization=True",
    ),
    (
        r"(?:.*_)?model_.*pp-rank-[0-9]+-of-.*\.safetensors|checkpoint_metadata\.json",
        "a part of nanotron's checkpoint ({found}); name the directory that holds "
        "checkpoint_metadata.json, model_config.json and model/",
    ),
    (
        r"rank[0-9]+\.pt|optim/",
        "a part for each process of OLMo's first trainer ({found}); put them together with its "
        "scripts/unshard.py",
    ),
    (
        r"checkpoint.*-(?:model_part|shard).*\.pt",
        "a part for each process of metaseq ({found}); write it with the "
        "convert_opt_original_pytorch_checkpoint_to_pytorch.py of transformers 4",
    ),
    (
        r"(?:actor|critic)/",
        "a checkpoint of verl ({found}) without the parts of FSDP that are read, "
        "actor/model_world_size_*_rank_*.pt; --pattern finds what lies further below, such as a "
        "model in actor/huggingface, else `python -m verl.model_merger merge` of verl writes one",
    ),
    (
        r"(?:model-rank-[0-9]+-part-[0-9]+|rank[0-9]+)\.safetensors",
        "weights as vLLM or TensorRT-LLM splits them to serve them ({found}); scan the model that "
        "they were made of",
    ),
    (
        r"model_[0-9]{8}\.bin",
        "a checkpoint of llm.c ({found}); write it with its dev/eval/export_hf.py",
    ),
    (
        r"model_index\.json",
        "a pipeline of Diffusers ({found}); read are decoders of text",
    ),
    (
        r"model_weights/|context/",
        "a checkpoint of NeMo ({found}); write it with `nemo llm export path=... target=hf "
        "output_path=...`",
    ),
    (
        r".*\.nemo",
        "a packed checkpoint of NeMo ({found}); write it with NeMo's own export to Hugging Face",
    ),
    (
        r"layer_[0-9]+-model_.*\.pt|layer_[0-9]+.*\.pt",
        "a pipeline of GPT-NeoX or Megatron-DeepSpeed ({found}); write it with its "
        "tools/ckpts/convert_neox_to_hf.py",
    ),
    (
        r".*-[0-9]{5}-of-[0-9]{5}\.gguf",
        "parts of one GGUF ({found}); join them with llama.cpp's llama-gguf-split --merge",
    ),
    (
        r".*\.gguf",
        "files of GGUF ({found}); name the one to measure, or scan the model they were made of",
    ),
    (
        r"tf_model\.h5|.*\.h5|flax_model.*\.msgpack|.*\.ckpt(?:-[0-9]+)?\.(?:index|meta|data.*)|"
        r"saved_model\.pb",
        "weights of TensorFlow or Flax ({found}); load them with an older transformers "
        "(4.x, from_tf=True or from_flax=True) and save them with save_pretrained",
    ),
    (
        r".*\.keras",
        "a model of Keras ({found}); write it with KerasHub's export_to_transformers",
    ),
    (
        r".*\.(?:pdparams|pdiparams|mindir|msgpack)|streaming_(?:params|train_state).*",
        "weights of Paddle, MindSpore or Flax ({found}); write them with that framework's own "
        "converter to Hugging Face",
    ),
    (
        r"_CHECKPOINT_METADATA|_METADATA|manifest\.ocdbt|ocdbt\.process_.*|_sharding",
        "a checkpoint of JAX by Orbax ({found}); write it with its project's own converter to "
        "Hugging Face, such as MaxText's to_huggingface.py or levanter.main.export_lm_to_hf",
    ),
    (
        r".*\.npz|.*\.npy",
        "arrays of NumPy ({found}); save the model with save_pretrained",
    ),
    (
        r".*\.onnx.*|.*\.(?:tflite|mlmodel|mlpackage/?|engine|plan|pte|pt2|torchscript)|"
        r"openvino_model\.(?:xml|bin)",
        "an exported graph ({found}), of which no block can be read; scan the model it was made of",
    ),
    (
        r".*\.(?:tar|tgz|zip|7z|gz|bz2|xz|zst|lz4)(?:\.[0-9]+)?|.*\.part[-_]?(?:[a-z]{2}|[0-9]+)",
        "a packed archive, or its parts ({found}); unpack or join them first",
    ),
    (
        r"(?:pytorch_model_fsdp_[0-9]+|model_and_optim)/|.*\.distcp",
        "shards ({found}) without .metadata, which is written last; unless that is still to come, "
        "they cannot be put together",
    ),
    (
        r"(?:\w+_)?(?:train|val|valid|validation|test)(?:[-_][0-9]+)*(?:-of-[0-9]+)?"
        r"\.(?:bin|idx|parquet|jsonl?|arrow)|.*\.arrow|dataset_info\.json|.*_document\.(?:bin|idx)",
        "a data set ({found}) and no weights; name the directory of the checkpoints",
    ),
    (
        rf"(?!{_STATE}).*\.(?:pkl|pickle|joblib)",
        "a pickle of Python objects ({found}), which can run code and is not read; load it where "
        "you trust it, and save the model with save_pretrained",
    ),
    (
        rf"(?!{_STATE}).*\.(?:safetensors|bin|pth?|ckpt)",
        "weights under a name that is not read ({found}); save the model with save_pretrained",
    ),
    (
        rf"(?:{_STATE}).*|trainer_state\.json",
        "the state of training ({found}) and no weights; save the model, too",
    ),
    (
        r"(?:vocab\.json|merges\.txt|tokenizer.*|special_tokens_map\.json)",
        "a tokenizer ({found}) and no weights; name the directory of the model",
    ),
)
"""Names, and what they are; the first that some name matches counts."""


def of(files: Files) -> str:
    """What stands in a directory that should be a checkpoint, and what to do about it.

    Raises:
        ArchiveError: it is not a directory, or cannot be read.
    """
    if (kind := known(files)) is not None:
        return kind
    there = names(files)
    if not there:
        return f"{files.location} is empty; is the checkpoint still being written?"
    cure = "save the model with save_pretrained"
    if any(name.endswith("/") for name in there):
        cure = "--pattern finds what lies further below"
    return f"{files.location} holds nothing of a format that is known ({few(there)}); {cure}"


def known(files: Files) -> str | None:
    """The same where it is a kind that is known, else None.

    Raises:
        ArchiveError: it is not a directory, or cannot be read.
    """
    gone = sorted(entry.name for entry in islice(files.entries(), _MOST) if entry.dangling)
    if gone:
        return (
            f"{files.location} holds links to what is not there ({few(gone)}); copy or download "
            "the checkpoint again, with what its links lead to"
        )
    there = names(files)
    if _ADAPTER in there and not any(re.match(r"adapter_model|.*adapters\.safe", n) for n in there):
        return (
            f"{files.location} holds {_ADAPTER} without adapter_model.safetensors; is the "
            "checkpoint still being written?"
        )
    if _ADAPTER not in there and (
        matching := [name for name in there if re.fullmatch(r"adapter_model.*\.[a-z]+", name)]
    ):
        return (
            f"{files.location} holds an adapter's weights ({few(matching)}) without {_ADAPTER}, "
            "which says how they are merged; copy it from where they come from"
        )
    below = [name for name in there if name.endswith("/") and not step_of(name[:-1])][:_LOOKED]
    if _ADAPTER not in there and (
        matching := [name for name in below if files.at(name[:-1]).exists(_ADAPTER)]
    ):
        return (
            f"{files.location} holds adapters by name ({few(matching)}); choose one with "
            f"--pattern, such as '.*-(?P<step>[0-9]+)/{re.escape(matching[0][:-1])}'"
        )
    for pattern, said in _KINDS:
        matching = [name for name in there if re.fullmatch(pattern, name, re.IGNORECASE)]
        if matching and (matching != ["context/"] or "weights/" in there):
            return f"{files.location} holds {said.format(found=few(matching))}"
    return None


def of_deepspeed(files: Files) -> bool:
    """Whether a directory is DeepSpeed's state of a model, as it lies in a checkpoint."""
    try:
        return any(_DEEPSPEED.fullmatch(name) for name in names(files))
    except ArchiveError:
        return False


def few(found: Sequence[str]) -> str:
    """The first of many names."""
    return ", ".join(found[:_NAMED]) + (
        f" and {len(found) - _NAMED} more" if found[_NAMED:] else ""
    )


def names(files: Files) -> list[str]:
    """What a directory holds; directories with a slash behind their names."""
    listed = islice(files.entries(), _MOST)
    return sorted(
        entry.name + ("/" if entry.directory else "")
        for entry in listed
        if not entry.name.startswith("._")  # macOS's notes on a file of that name
    )
