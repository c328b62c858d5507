"""What became of every flag of the published scripts; a test holds the table against the parsers.

``arguments`` adds the flags marked NOTICE from here: they are accepted, and a line of the log says what holds instead.
"""

LINEAR = {
    "--csv_path": "works as published",
    "--csv_filename": "works as published; the default, which crashed, is results.csv",
    "--root_path": "works as published; surrounding blanks and a missing final slash do no harm",
    "--model": "works as published; any timm or Hugging Face backbone besides",
    "--percent_data": "works as published",
    "--nb_classes": "works as published (2 reads binary_label); labels outside 0..nb_classes-1 are refused",
    "--batch_size": "works as an upper bound: the loader takes smaller pieces",
    "--num_workers": "works as published; the default is chosen from the machine",
    "--output_dir": "works as published; each run has a folder of its own inside",
    "--pretrained_checkpoint": "works as published; unfitting files are refused instead of ignored",
}

FINETUNING = {
    # training
    "--mode": "works as its help says (it did nothing): eval is the same as --eval",
    "--batch_size": "works as published: images of a forward pass of one process",
    "--epochs": "works as published",
    "--update_freq": "works as published",
    "--save_ckpt_freq": "works as its help says (it did nothing): keep a checkpoint every so many epochs; 0, the "
                        "default, keeps none",
    "--seed": "works as published",
    "--start_epoch": "works as published",
    "--device": "works as published; the default picks cuda, mps or cpu",
    # model
    "--model": "works as published; any timm or Hugging Face backbone besides",
    "--rel_pos_bias": "works as published, for PanDerm and other BEiTs",
    "--disable_rel_pos_bias": "works as published",
    "--sin_pos_emb": "works as its help says: PanDerm's fixed sin-cos positions, the default",
    "--disable_sin_pos_emb": "works as its help says (it did nothing): positions are trained",
    "--layer_scale_init_value": "works as published; a checkpoint's LayerScale wins, as published",
    "--input_size": "works as its help says (other than 224 crashed): positions are resampled",
    "--drop": "works as published",
    "--attn_drop_rate": "works as published",
    "--drop_path": "works as published",
    "--use_mean_pooling": "works as published, PanDerm's default; other models have their own",
    "--use_cls": "works as its help says: class token after the pretrained final norm (it was a fresh one)",
    "--init_scale": "works as published",
    "--enable_linear_eval": "works as its help says: the same as --tune head",
    "--ood_eval": "NOTICE: did nothing; an external test set is --test_csv_path",
    # optimiser
    "--opt": "works as published, by timm's names",
    "--opt_eps": "works as published",
    "--opt_betas": "works as published",
    "--clip_grad": "works as published",
    "--momentum": "works as published",
    "--weight_decay": "works as published",
    "--weight_decay_end": "works as its help says (it crashed): weight decay goes there by a cosine",
    "--lr": "works as published (not scaled by the batch)",
    "--layer_decay": "works as published",
    "--warmup_lr": "works as its help says (it did nothing); the default is 0, where the published warm-up began",
    "--min_lr": "works as published",
    "--warmup_epochs": "works as published",
    "--warmup_steps": "works as published, from 1 on; alone, too (it crashed)",
    "--disable_weight_decay_on_rel_pos_bias": "works as published",
    # augmentation
    "--color_jitter": "works as its help says (it did nothing); left out, hue 0.2 alone, as the published code did",
    "--aa": "works as its help says (it did nothing): timm's RandAugment and the like; off, as the code did",
    "--smoothing": "works as published",
    "--train_interpolation": "works as its help says (it did nothing); bilinear by default, as the code did",
    "--crop_pct": "works as its help says (it did nothing); left out, the backbone's own",
    "--reprob": "works as its help says (it did nothing); the default is 0, as the published code did",
    "--remode": "works as its help says (it did nothing)",
    "--recount": "works as its help says (it did nothing)",
    "--resplit": "works as its help says (it did nothing): the first half of a batch stays without random erasing",
    "--mixup": "works as published",
    "--cutmix": "works as published",
    "--cutmix_minmax": "works as published",
    "--mixup_prob": "works as published",
    "--mixup_switch_prob": "works as published",
    "--mixup_mode": "works as published",
    # data
    "--csv_path": "works as published",
    "--root_path": "works as published; surrounding blanks and a missing final slash do no harm",
    "--image_key": "works as published",
    "--nb_classes": "works as published; binary sets, which crashed, too",
    "--percent_data": "works as published: with seed 0 the same images, with others other draws",
    "--weights": "works as published; with percent_data below 1, binary_label and several GPUs, too",
    "--num_workers": "works as published; the default is chosen from the machine",
    "--pin_mem": "works as published, on by default",
    "--no_pin_mem": "works as published",
    "--imagenet_default_mean_and_std": "NOTICE: the backbone's own data config decides mean and std",
    "--data_path": "works as its help says (it did nothing): the folder of the images where --root_path is not given",
    "--eval_data_path": "works as its help says (it did nothing): the folder of the images of --test_csv_path",
    "--test_csv_path": "works as its help says (it did nothing): an external test set",
    "--data_set": "works as its help says (it did nothing): the data set's name in the results",
    # evaluation
    "--TTA": "works as published; images of any sizes, in batches",
    "--monitor": "works as published; bacc, auroc and loss besides. Default: auroc for two classes, else acc",
    "--eval": "works as published (it crashed)",
    "--resume": "works as published (it crashed): a checkpoint to test with --eval, or to continue from",
    "--dist_eval": "NOTICE: several processes always share the evaluation, each image once",
    "--disable_eval_during_finetuning": "works as its help says (it did nothing): no val, the last epoch's model",
    # moving average
    "--model_ema": "works as its help says: the average is evaluated and chosen (it was only stored)",
    "--model_ema_decay": "works as published, approached from below: min(decay, (1 + t) / (10 + t)) at update t",
    "--model_ema_force_cpu": "works as published",
    # files
    "--pretrained_checkpoint": "works as published; unfitting files are refused instead of ignored",
    "--model_key": "works as published",
    "--model_prefix": "works as published",
    "--output_dir": "works as published",
    "--log_dir": "works as published: TensorBoard",
    "--auto_resume": "works as its help says (it found nothing): an unfinished run is continued, the default",
    "--no_auto_resume": "works as its help says: an unfinished run is refused",
    "--save_ckpt": "works as its help says, the default",
    "--no_save_ckpt": "works as its help says (it did nothing): no checkpoint files, so no resume",
    "--exp_name": "works as its help says (it did nothing): the run's name in wandb",
    "--wandb_name": "works as published: the wandb project; only with --wandb",
    # processes
    "--world_size": "NOTICE: torchrun decides the number of processes",
    "--local_rank": "NOTICE: torchrun tells each process its number",
    "--dist_on_itp": "NOTICE: start several processes with torchrun",
    "--dist_url": "NOTICE: torchrun knows where the processes meet",
    "--enable_deepspeed": "REFUSED: use torchrun (one process per GPU), with --amp_dtype bf16 and --grad_checkpointing "
                          "where memory is short",
    "--enable_multi_print": "works as its help says: every process prints its log",
}

SEGMENTATION = {
    "--cfg": "NOTICE: options come from a file with -c FILE.yaml",
    "--workers": "works as published (0, which failed, too); the default is chosen from the machine",
    "--gpu": "works as its help says: numbers of the GPUs (\"0\", the default, crashed); several need torchrun",
    "--batch_size": "works as published: images of a forward pass of one process; the default is the recipe's",
    "--test_batch_size": "works as published, as an upper bound",
    "--epoch": "works as published; the default is the recipe's",
    "--resume": "works as its help says (it started over): go on with this fold of --kfold alone; without --kfold an "
                "unfinished run always goes on",
    "--lr": "works as published; the default is the recipe's",
    "--weight_decay": "works as published; the default is the recipe's",
    "--pretrained": "works as its help says (the path was in the code): the backbone's checkpoint; unfitting files are "
                    "refused",
    "--size": "works as its help says (other than 224 crashed): positions are resampled; two numbers are height and "
              "width",
    "--kfold": "works as its help says (it trained five times on one split): cross-validation in 5 parts, or so many, "
               "lesions kept together",
    "--model": "works as published: cae_seg; any timm or Hugging Face backbone besides. The others crashed and are "
               "refused",
    "--patch_size": "NOTICE: the backbone's name decides (it did nothing)",
    "--window_size": "NOTICE: the backbone's name decides (it did nothing); sliding windows are --window",
    "--embed_dim": "NOTICE: the backbone's name decides (it did nothing)",
    "--depths": "NOTICE: the backbone's name decides (it did nothing)",
    "--num_heads": "NOTICE: the backbone's name decides (it did nothing)",
    "--save_name": "works as published: the run's folder, in which everything lies",
    "--dataset": "works as its help says (ISIC 2018 alone was read): a public set by its name",
    "--dataset_path": "NOTICE: the data lie in --parent_path (it did nothing)",
    "--parent_path": "works as published, with or without a slash at its end",
    "--split": "NOTICE: the archive's folders or the CSV's column split decide (it did nothing)",
    "--smoke_test": "NOTICE: log.txt has the course of every run; wandb and TensorBoard only when asked for",
    "--seed": "works as published; the default is 0",
    "--percent": "works as published: per cent of the train images, of a seeded draw instead of the first found",
    "--save_results": "works as published: outlined test images, in overlays/",
    "--log_name": "works as published: the run's name in wandb",
    "--description": "works as published: the run's notes in wandb",
    "--tags": "works as published: tags in wandb, one or more",
    "--id": "works as published: the run's id in wandb; left out, the run's fingerprint",
    "--resume_wandb": "NOTICE: a run that goes on always goes on in wandb, too",
    "--update_config": "NOTICE: args.yaml and env.json are always those of the run (it neither trained nor tested)",
    "--use_tensorboard": "works as published: TensorBoard files in the run's folder log/",
    "--evaluate": "works as published; a missing checkpoint is refused (a random head was scored)",
}

PUBLISHED = {"linear_eval.py": LINEAR, "run_class_finetuning.py": FINETUNING, "segmentation/run.py": SEGMENTATION}
# of the NOTICE flags
TAKES_VALUE = ("--world_size", "--local_rank", "--dist_url", "--cfg", "--patch_size", "--window_size", "--embed_dim",
               "--depths", "--num_heads", "--dataset_path", "--split")


def accepted_only(script: str) -> dict[str, str]:
    """The flags of a script without effect, and what is said when they are given."""
    return {flag: text.removeprefix("NOTICE: ") for flag, text in PUBLISHED[script].items()
            if text.startswith("NOTICE: ")}


def refused(script: str) -> dict[str, str]:
    """The flags that end a script, and what to do instead."""
    return {flag: text.removeprefix("REFUSED: ") for flag, text in PUBLISHED[script].items()
            if text.startswith("REFUSED: ")}
