# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Horse or human: a tour
#
# You know the exercise. A thousand pictures, two classes, a small convolutional network; training
# accuracy climbs to 100 %, and validation accuracy sits at exactly 50 %. Then a pretrained
# Inception network gets nearly everything right, and the lesson moves on.
#
# This tour stays. It asks at each step what went wrong, and looks. It takes two minutes on two
# cores, and no network: pictures, weights and classifiers are in the package.

# %%
try:
    import horsehuman
except ModuleNotFoundError:
    raise SystemExit(
        "This kernel lacks the package. Clone the repository (on Colab: !git clone ADDRESS), run\n"
        "%pip install -e 'PATH_OF_THE_CLONE[export]' in a cell, and restart the kernel."
    ) from None

# %%
import io
import logging
import sys
import tempfile
import warnings
from collections import Counter

import lightning as L
import numpy as np
import torch
from IPython import display
from PIL import Image
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

# %%
warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
# %cd -q {tempfile.mkdtemp(prefix="tour_")}
# %env TERM=dumb
command = f"{sys.executable} -m horsehuman"

# %% [markdown]
# ## The pictures
#
# `HorseHumanDataModule` reads them. A picture is a tensor of 8-bit RGB values; every later step,
# resizing included, happens inside the models, so that no two programs can disagree about it.

# %%
from horsehuman import HorseHumanDataModule, read_picture


def show_picture(image):
    file = io.BytesIO()
    image.convert("RGB").save(file, "JPEG")
    return display.Image(file.getvalue())


def show(images, columns):
    return show_picture(to_pil_image(make_grid(images, columns)))


# %%
data = HorseHumanDataModule(image_size=96)
data.setup()
show(data.samples(columns=12), 12)

# %% [markdown]
# A file name says more than the class: `human17-04` is frame 4 of subject 17. These are renderings,
# and a subject was rendered 10 to 31 times.

# %%
for split in ("train", "validation", "test"):
    records = [record for record in data.records if record.split == split]
    subjects = Counter(record.group for record in records)
    print(f"{split:10} {len(records):5} pictures of {len(subjects):2} subjects")


# %% [markdown]
# The first row below has ten frames of one subject. How many pictures is that? For a network that
# has learned the first, the others are hardly news. The 1,027 training pictures are nearer to 67,
# and the official validation set, which we call the test set, shows the eleven subjects of the
# other rows.


# %%
def read(records, size=72):
    pictures = [Image.fromarray(read_picture(record.path)) for record in records]
    arrays = [np.asarray(picture.resize((size, size))) for picture in pictures]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def of_subject(group, count=10):
    return [record for record in data.records if record.group == group][:count]


subject = next(record.group for record in data.records if "human17" in record.path.name)
tests = sorted({record.group for record in data.records if record.split == "test"})
show(torch.cat([read(of_subject(group)) for group in [subject, *tests]]), 10)

# %% [markdown]
# So a fifth of the *subjects* is held out for validation, never a fifth of the frames. Watch what
# frames do to an honest method: find the nearest training picture, pixel by pixel, and answer its
# class. Nobody would call that vision.

# %%
train = [record for record in data.records if record.split != "test"]
pixels = read(train, 32).flatten(1).float()
labels = torch.tensor([record.label for record in train])
groups = np.array([record.group for record in train])

# %%
rng = np.random.default_rng(0)


def accuracy_of_nearest(held_out):
    distance = torch.cdist(pixels[held_out], pixels[~held_out])
    return float((labels[~held_out][distance.argmin(1)] == labels[held_out]).float().mean())


for name, ids in {"frames": np.arange(len(train)), "subjects": groups}.items():
    choices = [rng.choice(np.unique(ids), len(set(ids)) // 5, replace=False) for _ in range(50)]
    splits = [torch.from_numpy(np.isin(ids, choice)) for choice in choices]
    print(f"{name} held out: {np.mean([accuracy_of_nearest(split) for split in splits]):.1%}")

# %% [markdown]
# ## The network of the course
#
# Three convolutions, a dense layer of 512, RMSprop; rotated, shifted and zoomed pictures to learn
# from; the official set for validation after every epoch. A callback prints the two numbers.

# %%
from horsehuman import CNNClassifier


class Curve(L.Callback):
    def on_train_epoch_end(self, trainer, module):
        validation = trainer.callback_metrics["val/acc"]
        print(f"training {module.train_accuracy.compute():6.1%}   validation {validation:6.1%}")


shape = {"channels": [16, 32, 64], "convolutions": 1, "batch_norm": False, "mirror": False}
dense = {"pool": "flatten", "hidden": [512], "dropout": 0, "mean": [0, 0, 0], "std": [1, 1, 1]}
recipe = {"optimizer": {"name": "RMSprop", "lr": 1e-4}, "schedule": "constant"}

# %%
quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}


def train_as_in_the_course(augment):
    L.seed_everything(0, verbose=False)
    model = CNNClassifier(**recipe, **shape, **dense)
    data = HorseHumanDataModule(model.image_size, validation="test", augment=augment)
    trainer = L.Trainer(max_epochs=4, callbacks=[Curve()], **quiet)
    trainer.fit(model, datamodule=data)
    return trainer


augment = {"rotation": 40, "shift": 0.2, "zoom_from": 0.8, "zoom_to": 1.2, "flip": True}
train_as_in_the_course(augment).save_checkpoint("course.ckpt")

# %% [markdown]
# There it is: training climbs, validation stays at 50.0 %. Half of the pictures are humans, so a
# network that gives every picture the same answer is right half of the time, exactly.

# %%
from horsehuman import load_classifier, predict

test = [record for record in data.records if record.split == "test"]


def print_answers(classifier):
    predictions = list(predict(classifier, [record.path for record in test], always_answer=True))
    right = sum(p.class_name == test[i].path.parent.name for i, p in enumerate(predictions))
    print(Counter(p.class_name for p in predictions), f"{right} of {len(test)} right")


print_answers(load_classifier("course.ckpt"))

# %% [markdown]
# Why this answer? Ask the network where it looked. `explain` draws the regions that support the
# answer, and below them feature maps of every layer. In the first layers a horse is still a horse.

# %%
horse = test[0].path
# !{command} explain {horse} --model course.ckpt --out course.png 2>&1
show_picture(Image.open("course.png"))

# %% [markdown]
# The evidence is strongest between the legs and at the feet, where the ground would be. What is
# there? Look at the edges of the pictures:


# %%
def white_share_of_border(records):
    pictures = read(records, 300)
    edges = [pictures[..., 0, :], pictures[..., -1, :], pictures[..., 0], pictures[..., -1]]
    return (torch.cat(edges, 2) >= 245).all(1).float().mean()


print(f"white pixels on the edges, training: {white_share_of_border(train):.1%}")
print(f"white pixels on the edges, test:     {white_share_of_border(test):.1%}")

# %% [markdown]
# The training pictures are scenes, the test pictures are cut-outs on white. Whatever the network
# learned of meadows and streets is void on white paper. Pixels have the same trouble. Below, each
# test picture stands above the training picture that is nearest in pixels: bright things, found by
# brightness.

# %%
some = test[5::22]
distance = torch.cdist(read(some, 32).flatten(1).float(), pixels)
nearest = [train[index] for index in distance.argmin(1)]
show(torch.cat([read(some), read(nearest)]), len(some))

# %% [markdown]
# Is that the whole story? Take the augmentation away, and change nothing else:

# %%
trained = train_as_in_the_course(None)

# %% [markdown]
# The same network passes 75 % on the same white pictures. A network learns first what is easy.
# Scenery tells most training pictures apart, turned and shifted or not; the outline of a horse is
# much harder to learn when it is turned and shifted. So augmentation kept the easy clue easy and
# made the right one hard, and four epochs ended before the network had got to it. What is needed is
# an augmentation that spoils the wrong clue.
#
# ## Learn shape, then
#
# A network cannot be told to ignore backgrounds, but the pictures can make them useless: put the
# subject on a canvas of any colour, often white; light only an ellipse of it; turn its hues; shrink
# it. These are the training pictures of `model=cnn`, and its classifier is in the package. Its
# recipe was chosen on held-out training subjects, without a look at the test set.

# %%
# !{command} data --augmented --out sheets 2>&1 | tail -1
show_picture(Image.open("sheets/train-horses-augmented.png").crop((0, 0, 900, 600)))

# %%
print_answers(load_classifier("cnn"))

# %% [markdown]
# ## What a feature is
#
# An Inception network that has learned a thousand kinds of things from a million photographs turns
# a picture into 768 numbers, its features. `embed` returns them. Now find the nearest neighbours
# again, by features instead of pixels. (To save time, the backbone sees pictures of 150 pixels
# here; the default is 224 and 299.)

# %%
from horsehuman import InceptionClassifier

L.seed_everything(0, verbose=False)
mine = InceptionClassifier(scales=[150]).eval()
few = [record for group in sorted(set(groups)) for record in of_subject(group, 3)]
with torch.inference_mode():
    embedded = [mine.network.embed(images) for images in read([*some, *few], 150).split(32)]
embedded = torch.cat(embedded) - torch.cat(embedded).mean(0)
embedded = torch.nn.functional.normalize(embedded)
similarity = embedded[: len(some)] @ embedded[len(some) :].T
nearest = [few[index] for index in similarity.argmax(1)]
show(torch.cat([read(some), read(nearest)]), len(some))

# %% [markdown]
# With such features one linear layer is enough, and it takes seconds to train, because the backbone
# is frozen: each picture passes through it once. Frozen means all of it, batch norm's running means
# too.

# %%
trainer = L.Trainer(max_epochs=25, enable_checkpointing=False, **quiet)
data = HorseHumanDataModule(mine.image_size)
trainer.fit(mine, datamodule=data)
tested = trainer.test(mine, datamodule=data, verbose=False)
print({name: round(value, 3) for name, value in tested[0].items()})

# %% [markdown]
# ## Which one is better, and by how much?
#
# Both classifiers answered the same 256 pictures, so they are compared picture by picture. And 256
# pictures of eleven subjects are not 256 independent questions: intervals by group say so.

# %%
# !{command} compare cnn inception --out compared 2>/dev/null
show_picture(Image.open("compared/compare.png"))

# %% [markdown]
# ## A photograph
#
# So far everyone was rendered. Here is a person: Rear Admiral Grace Hopper, photographed in 1984, a
# picture that comes with matplotlib. And a plot, which is neither horse nor human; and the admiral
# beside a horse, which is both.

# %%
import matplotlib.pyplot as plt
from matplotlib.cbook import get_sample_data

hopper = Image.open(get_sample_data("grace_hopper.jpg")).resize((300, 300))
figure, axes = plt.subplots(figsize=(3, 3))
axes.plot(np.random.default_rng(0).normal(size=100).cumsum())
figure.savefig("plot.png", dpi=100)
plt.close(figure)

# %%
plot = Image.open("plot.png").convert("RGB")
both = Image.new("RGB", (600, 300))
both.paste(Image.fromarray(read_picture(train[200].path)), (0, 0))
both.paste(hopper, (300, 0))

# %%
for name in ("cnn", "inception"):
    answers = predict(load_classifier(name), [hopper, plot, both])
    for title, answer in zip(("admiral", "plot", "both"), answers, strict=True):
        print(f"{name:10} {title:8} {answer.status:8} {answer.class_name:7} {answer.logit:6.2f}")
show_picture(both)

# %% [markdown]
# The CNN has seen 67 renderings and must choose one of two words. The other classifier has outputs
# that learned from photographs of other things, and may say *neither* and *both*.
#
# ## Take it along
#
# An exported classifier is one file. It takes pictures of any size, because resizing is part of it,
# and it runs without torch. `predict` reads it as it reads a checkpoint.

# %%
hopper.save("admiral.png")
# !{command} export --model cnn --out cnn.onnx 2>&1 | tail -1
# !{command} predict admiral.png --model cnn 2>/dev/null
# !{command} predict admiral.png --model cnn.onnx 2>/dev/null

# %% [markdown]
# ## On from here
#
# - Two folders of your own: `python scripts/train.py data=folder data.root=DIR`, after
#   `horsehuman audit --data DIR` has told you whether you need groups.
# - [How the CNN's recipe was chosen](cnn.md), [when an answer is *neither*](neither.md), [all
#   results and how often the test set was looked at](results.md).
