"""What the keys are called elsewhere: words that people bring from other trainers.

`configs.build.did_you_mean` looks here before it looks for mistyped letters: `epochs` resembles no
key of ours, and `learning_rate` resembles `lr` in nothing that difflib would see.
"""

# Where the right answer depends on what is meant, all of them are offered.
WORDS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("learning_rate", "learningrate", "base_lr", "peak_lr"), ("optimizer.lr",)),
    **dict.fromkeys(("epochs", "num_epochs", "max_epochs", "n_epochs"), ("steps",)),
    **dict.fromkeys(("max_steps", "num_steps", "train_steps", "iterations", "iters"), ("steps",)),
    **dict.fromkeys(("batch_size", "bs", "train_batch_size"), ("data.batch",)),
    **dict.fromkeys(("dataset", "datasets", "datamodule"), ("data", "data.path")),
    **dict.fromkeys(
        ("logger", "loggers", "logging"),
        ("log.tensorboard", "log.csv", "log.wandb", "log.mlflow"),
    ),
    **dict.fromkeys(("wandb_project", "project", "entity"), ("log.wandb",)),
    **dict.fromkeys(("experiment_name", "exp_name", "exp"), ("experiment",)),
    **dict.fromkeys(("output_dir", "out_dir", "save_dir", "workdir", "log_dir"), ("run_dir",)),
    **dict.fromkeys(("ckpt_path", "resume_from", "restore", "load_from"), ("init_from",)),
    **dict.fromkeys(("log_interval", "log_every_n_steps", "logging_steps"), ("log_every",)),
    **dict.fromkeys(("eval_interval", "eval_steps", "val_check_interval"), ("eval.every",)),
    **dict.fromkeys(("save_every", "save_steps", "save_interval"), ("checkpoint.every",)),
    **dict.fromkeys(("early_stopping", "early_stop"), ("eval.patience",)),
    **dict.fromkeys(("grad_clip", "clip", "gradient_clip_val"), ("optimizer.clip_norm",)),
    **dict.fromkeys(("max_grad_norm", "grad_norm"), ("optimizer.clip_norm",)),
    **dict.fromkeys(
        ("grad_accum", "accumulate_grad_batches", "gradient_accumulation_steps"),
        ("optimizer.accumulate",),
    ),
    **dict.fromkeys(("warmup_steps", "num_warmup_steps"), ("optimizer.warmup",)),
    **dict.fromkeys(("scheduler", "lr_scheduler"), ("optimizer.schedule",)),
    **dict.fromkeys(("optim", "opt", "optimiser"), ("optimizer",)),
    **dict.fromkeys(("ema_decay", "use_ema"), ("optimizer.ema",)),
    **dict.fromkeys(("precision", "mixed_precision", "fp16", "bf16"), ("model.dtype",)),
    **dict.fromkeys(("num_layers", "n_layer", "n_layers", "layers"), ("model.depth",)),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "hidden_dim"), ("model.width",)),
    **dict.fromkeys(("num_heads", "n_head", "n_heads"), ("model.heads",)),
    **dict.fromkeys(("block_size", "seq_len", "max_length", "context"), ("data.length",)),
    **dict.fromkeys(("devices", "gpus", "num_gpus"), ("mesh.data",)),
    **dict.fromkeys(("strategy", "accelerator"), ("mesh.data", "mesh.fsdp")),
    **dict.fromkeys(("num_nodes", "world_size"), ("distributed.num_processes",)),
    **dict.fromkeys(("random_seed", "rng_seed"), ("seed",)),
    **dict.fromkeys(("trainer", "config", "task"), ("experiment",)),
}
