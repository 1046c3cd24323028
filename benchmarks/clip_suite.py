"""Score merges and a twin of CLIP's fine-tuned image towers on image folders, the standard eight-task table of CLIP.

    python benchmarks/clip_suite.py --clip CLIP --experts DIR --data DIR --out DIR

CLIP is a folder of a CLIPModel with its tokenizer and image processor. DIR/<task> of --experts is a fine-tuned image
tower (CLIPVisionModel), tuned from that of CLIP. DIR/<task> of --data has `test/<class>/*.png` or `.jpg`, and
`train/<class>/…` for the router of the twin; without it no twin is scored. DIR/<task>/task.json may hold `classes` (the
class's folder -> its name in texts) and `templates`; else a folder's name is the class's, and "a photo of a {}." the
template. The standard table has SUN397, Cars, RESISC45, EuroSAT, SVHN, GTSRB, MNIST and DTD (Ilharco et al. 2023, arXiv
2212.04089), the templates of CLIP's authors, and the test images of those data sets.

Parameters of the methods are their papers' defaults; nothing is tuned on the test images. Rows of all tasks are scored
whole: "head given" of a merge, and of a twin also routed, where an answer counts if task and class are right.
"""

from __future__ import annotations

from pathlib import Path

import torch

from clip_suite_parts.score import score
from kit.command import command_line


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--clip", type=Path, required=True, help="folder of the CLIP model")
    parser.add_argument("--experts", type=Path, required=True, help="folder of the fine-tuned image towers")
    parser.add_argument("--data", type=Path, required=True, help="folder of the tasks' images")
    parser.add_argument("--out", type=Path, required=True, help="folder of the classifiers and the scores")
    parser.add_argument("--tasks", help="comma-separated; all folders of --experts without it")
    parser.add_argument(
        "--rows", type=int, help="test images of each task, the first of each class in turn; all without it"
    )
    parser.add_argument("--rank", type=int, default=16, help="of the twin's matrices")
    parser.add_argument("--device", default="cpu", help="where the models answer")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tasks = (
        args.tasks.split(",") if args.tasks else sorted(path.name for path in args.experts.iterdir() if path.is_dir())
    )
    score(args.clip, args.experts, args.data, args.out, tasks, args.rows, args.rank, args.device)


if __name__ == "__main__":
    main()
