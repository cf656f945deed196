"""Examples and first settings in the help of every verb."""

EXAMPLES: dict[str, tuple[tuple[str, str], ...]] = {
    "shard": (
        ("folders of tiles, one for each class", "ca2cl shard tiles/train shards/train"),
        ("the slide's name in each path, for honest statistics",
         "ca2cl shard tiles/train shards/train --group_pattern '(TCGA-..-....)'"),
        ("whole slides: tiles of 224 pixels at 0.5 micrometres a pixel",
         "ca2cl shard slides/ shards/train --mpp 0.5 --tile 224"),
    ),
    "pretrain": (
        ("on a laptop", "ca2cl pretrain --recipe crc5_small --data.shards shards/train --run.output_dir runs/first"),
        ("on eight GPUs, with the paper's settings",
         "ca2cl launch --multi_gpu --num_processes 8 -m ca2cl pretrain --recipe nct_resnet18 "
         "--data.shards shards/train --run.output_dir runs/paper"),
        ("from the weights of a ViT",
         "ca2cl pretrain --recipe continue_vit_small --model.weights timm:vit_small_patch14_dinov2.lvd142m "
         "--data.shards shards/train --run.output_dir runs/vit"),
    ),
    "study": (
        ("CA2CL, its parts and SimCLR for equal minutes, three seeds each",
         "ca2cl study study_crc5 --shards shards/train --test shards/test --output_dir study"),
        ("its jobs and their states", "ca2cl study study_crc5 --shards shards/train --test shards/test --list"),
        ("one job, as in a Slurm array", "ca2cl study my_study.yaml --output_dir study --job 3"),
    ),
    "probe": (
        ("classifiers on frozen features, beside the baselines",
         "ca2cl probe --encoder champion --train shards/train --test shards/test"),
        ("two encoders on the same draws and tiles",
         "ca2cl probe --encoder RUN_ID --against RUN_ID_2 --train shards/train --test shards/test"),
        ("10 and 100 labelled tiles for each class",
         "ca2cl probe --encoder champion --train shards/train --test shards/test --labels 10 100"),
    ),
    "finetune": (
        ("train the whole encoder at three label budgets",
         "ca2cl finetune --encoder champion --train shards/train --test shards/test --output_dir runs/tuned"),
        ("beside random weights, and register the classifier",
         "ca2cl finetune --encoder champion --train shards/train --test shards/test --output_dir runs/tuned "
         "--against random --tracking.register_as ca2cl-classifier"),
        ("a ViT",
         "ca2cl finetune --encoder RUN_ID --train shards/train --test shards/test --output_dir runs/vit "
         "--optim.name adamw --optim.lr 1e-4 --optim.layer_decay 0.75"),
    ),
    "embed": (
        ("shards to a Parquet file", "ca2cl embed --encoder champion shards/test vectors.parquet"),
        ("a folder of tiles to safetensors", "ca2cl embed --encoder champion tiles/ vectors.safetensors"),
        ("straight from slides", "ca2cl embed --encoder champion slides/ vectors.parquet --mpp 0.5 --tile 224"),
    ),
    "heatmap": (
        ("classes of a fine-tuned classifier", "ca2cl heatmap ca2cl-classifier@champion slides/ --mpp 0.5 --out maps"),
        ("the linear classifier of a probe", "ca2cl heatmap ca2cl-runs/probe-RUN.json slides/ --mpp 0.5 --out maps"),
        ("clusters, without labels", "ca2cl heatmap champion slides/ --mpp 0.5 --clusters 6 --out maps"),
    ),
    "export": (
        ("a file for timm", "ca2cl export --encoder champion --to timm encoder.safetensors"),
        ("ONNX with the normalisation inside", "ca2cl export --encoder champion --to onnx encoder.onnx"),
        ("a backbone for detectron2", "ca2cl export --encoder RUN_ID --to detectron2 backbone.pth"),
    ),
    "detect": (
        ("gland detection on GlaS",
         "ca2cl detect --encoder champion --dataset glas --data coco/glas --output_dir runs/glas"),
        ("beside random weights",
         "ca2cl detect --encoder champion --dataset glas --data coco/glas --output_dir runs/glas --against random"),
        ("COCO files of your own",
         "ca2cl detect --encoder champion --dataset coco --data coco/mine --output_dir runs/mine"),
    ),
    "detect prepare": (
        ("GlaS as published", "ca2cl detect prepare glas Warwick_QU coco/glas"),
        ("CRAG", "ca2cl detect prepare crag CRAG coco/crag"),
        ("with a picture of the contours", "ca2cl detect prepare glas Warwick_QU coco/glas --preview glas.png"),
    ),
    "detect predict": (
        ("glands in images", "ca2cl detect predict runs/glas images/ predictions"),
        ("beside their truth", "ca2cl detect predict runs/glas coco/glas/test predictions --truth coco/glas/test.json"),
        ("a detector by its run", "ca2cl detect predict RUN_ID images/ predictions --overlays false"),
    ),
    "report": (
        ("a page about a run", "ca2cl report RUN_ID report.html"),
        ("on tiles that the encoder has not seen", "ca2cl report champion report.html --test shards/test"),
        ("a run in progress, by its folder", "ca2cl report runs/first report.html"),
    ),
    "encoders list": (
        ("all encoders", "ca2cl encoders list"),
        ("those of one name, with one metric", "ca2cl encoders list --name ca2cl-encoder --metrics accuracy"),
        ("for programs", "ca2cl encoders list --json"),
    ),
    "encoders show": (
        ("card, lineage and results", "ca2cl encoders show champion"),
        ("a version", "ca2cl encoders show models:/ca2cl-encoder/3"),
        ("for programs", "ca2cl encoders show 3 --json"),
    ),
    "encoders compare": (
        ("two versions", "ca2cl encoders compare 3 champion"),
        ("by one metric", "ca2cl encoders compare 3 4 --metric accuracy"),
        ("runs", "ca2cl encoders compare RUN_ID RUN_ID_2 --json"),
    ),
    "encoders promote": (
        ("move the alias champion", "ca2cl encoders promote 3"),
        ("only if it is better", "ca2cl encoders promote 3 --if_better accuracy"),
        ("exit code 3 if it is not", "ca2cl encoders promote 3 --if_better accuracy --exit_code"),
    ),
    "encoders import": (
        ("a timm model", "ca2cl encoders import timm:vit_small_patch14_dinov2.lvd142m"),
        ("a file of MoCo", "ca2cl encoders import moco.pth.tar --arch resnet50"),
        ("from a hub, with its normalisation",
         "ca2cl encoders import hf-hub:ORG/NAME --mean 0.5 0.5 0.5 --std 0.5 0.5 0.5"),
    ),
    "reproduce nct": (
        ("list the steps", "ca2cl reproduce nct --data nct --encoder champion --download --plan"),
        ("do them", "ca2cl reproduce nct --data nct --encoder champion --download --output_dir runs/tables"),
        ("try it on synthetic tissue, in minutes", "ca2cl reproduce nct --data made-up --encoder random --miniature"),
    ),
    "sync": (
        ("send what MLflow missed", "ca2cl sync runs/first"),
        ("to another store", "ca2cl sync runs/first --uri http://mlflow:5000"),
        ("a detection job", "ca2cl sync runs/glas"),
    ),
    "ui": (
        ("the store of the working directory", "ca2cl ui"),
        ("the store that a run was logged to", "ca2cl ui runs/first"),
        ("another store, on another port", "ca2cl ui --tracking.root ~/ca2cl-runs --port 5001"),
    ),
    "doctor": (
        ("check the machine", "ca2cl doctor"),
        ("check data and speed of a planned job", "ca2cl doctor --shards shards/train --batch_size 256"),
        ("look at the augmented views", "ca2cl doctor --views shards/train views.png --recipe crop --image_size 96"),
    ),
    "doctor plan": (
        ("a recipe on eight GPUs", "ca2cl doctor --plan --recipe nct_resnet18 --processes 8"),
        ("a ViT", "ca2cl doctor --plan --model.arch timm:vit_base_patch16_224 --run.batch_size 512 --processes 4"),
        ("on CPUs", "ca2cl doctor --plan --recipe crc5_small --device cpu --memory_gb 16"),
    ),
    "completion": (
        ("in this shell", 'eval "$(ca2cl completion bash)"'),
        ("in every bash", "ca2cl completion bash > ~/.local/share/bash-completion/completions/ca2cl"),
        ("in every zsh", "ca2cl completion zsh >> ~/.zshrc"),
    ),
    "quickstart": (
        ("everything on synthetic tissue, in minutes", "ca2cl quickstart"),
        ("in another folder", "ca2cl quickstart first-look"),
        ("longer", "ca2cl quickstart --steps 600"),
    ),
}  # fmt: skip
"""Three commands for each verb, each with what it is for."""

FIRST: dict[str, tuple[str, ...]] = {
    "shard": ("group_pattern", "mpp", "tile", "workers", "preview"),
    "pretrain": (
        "data.shards", "run.output_dir", "data.image_size", "model.arch", "model.weights", "run.batch_size",
        "run.epochs", "optim.lr", "run.precision", "tracking.uri",
    ),
    "study": ("output_dir", "shards", "test", "job", "list"),
    "probe": ("against", "labels", "seeds", "floors", "output"),
    "finetune": ("against", "labels", "seeds", "epochs", "precision", "tracking.register_as"),
    "embed": ("encoder", "mpp", "tokens", "batch_size", "precision", "overwrite"),
    "heatmap": ("mpp", "clusters", "encoder", "geojson"),
    "export": ("overwrite",),
    "detect": ("against", "seeds", "head", "times", "precision"),
    "detect prepare": ("images", "masks", "preview"),
    "detect predict": ("truth", "min_score", "overlays"),
    "report": ("test", "shards", "tiles"),
    "encoders list": ("name", "metrics", "json"),
    "encoders show": ("name", "json"),
    "encoders compare": ("metric", "json"),
    "encoders promote": ("alias", "if_better", "than", "exit_code"),
    "encoders import": ("name", "arch", "input_size", "mean", "std"),
    "reproduce nct": ("download", "plan", "labels", "tasks", "protocol"),
    "sync": ("uri",),
    "ui": ("run", "port", "host", "tracking.root"),
    "doctor": ("shards", "batch_size", "views", "recipe"),
    "doctor plan": ("processes", "memory_gb", "device", "model.arch", "run.batch_size", "run.micro_batch_size"),
    "completion": (),
    "quickstart": ("folder", "steps", "tiles_per_class"),
}  # fmt: skip
"""Settings to begin with, beside those that must be given."""
