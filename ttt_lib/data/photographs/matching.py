"""Which photographs match: copies and those that show something else are left out. Runs in a process of its own."""

from __future__ import annotations

import numpy as np
from scipy.sparse.csgraph import connected_components

from ttt_lib.data.photographs.features import extract, verify
from ttt_lib.data.photographs.job import MIN_MATCHES, USUAL_FOCAL, Job, Lens, Refusal

FLAT = 0.88  # of the matches: rooms and streets, seen with little parallax, have up to 0.8; posters and turns 0.91 to 1
TWINS = 0.5  # of the features of a picture: 0.99 where a pattern repeats, elsewhere 0.03 at most
MOVED = 0.0012  # of the longest side: what three quarters of the matches of a copy stay below


def match(job: Job) -> None:
    """Features and verified matches in the database; copies and strangers are left out."""
    first: dict[str, int] = {}
    for index, digest in enumerate(job.digests):
        if digest in first:
            job.leave_out(index, f"is a copy of {job.pictures[first[digest]].name}")
        first.setdefault(digest, index)
    _enough_places(job)
    keys = [(*size, picture.camera) for size, picture in zip(job.sizes, job.pictures)]
    cameras = list(dict.fromkeys(keys))
    job.camera_of = [cameras.index(key) for key in keys]
    focals, exact = job.focals()
    lenses = [
        Lens("SIMPLE_PINHOLE", width, height, ((focal or USUAL_FOCAL) * width, width / 2, height / 2))
        for focal, (width, height, _) in zip(focals, cameras)
    ]
    coarse, twins = extract(job, lenses, exact)
    alike = float(np.median(twins[job.kept]))
    if alike > TWINS:
        raise Refusal(
            f"the photographs show one pattern again and again ({alike:.0%} of its details have a twin elsewhere in the "
            "same picture), so which is which cannot be told: take in things that are there only once."
        )
    verify(job, coarse)
    for (i, j), count, distance in zip(job.pairs, job.inliers, job.moved):
        if i in job.kept and j in job.kept and count >= MIN_MATCHES and distance < MOVED * max(job.sizes[j]):
            job.leave_out(j, f"is a copy of {job.pictures[i].name}, or taken from the same place")
    _enough_places(job)
    _leave_out_strangers(job)
    _refuse_flat(job)


def too_few(most: int) -> Refusal:
    """What to raise where no two photographs have more matches than that."""
    return Refusal(
        f"the photographs share too few points ({most} matches at most, {MIN_MATCHES} are needed): they must show the same "
        "things, with texture, and overlap by half or more."
    )


def _enough_places(job: Job) -> None:
    if len(job.kept) < 2:
        if len(job.pictures) == 2:
            index, why = next(iter(job.left_out.items()))
            why = why if "," in why else f"{why}, or taken from the same place"
            raise Refusal(f"{job.pictures[index].name} {why}: take a second photograph a step to the side.")
        raise Refusal(
            "all photographs are taken from the same place or are copies of one: take the others a step to the side."
        )


def _leave_out_strangers(job: Job) -> None:
    """All but the largest group of photographs in which each is linked to the others by matches."""
    kept = list(job.kept)
    counts = np.zeros((len(kept), len(kept)), dtype=int)
    for (i, j), count in zip(job.pairs, job.inliers):
        if i in kept and j in kept:
            counts[kept.index(i), kept.index(j)] = counts[kept.index(j), kept.index(i)] = count
    number, group = connected_components(counts >= MIN_MATCHES, directed=False)
    best, size = counts.max(1), np.bincount(group)
    largest = max(range(number), key=lambda each: (size[each], best[group == each].sum()))
    if size[largest] < 2:
        raise too_few(best.max())
    for index, own, most in zip(kept, group, best):
        if own != largest:
            few = f" ({most} matches at most)" if size[own] == 1 else ""
            job.leave_out(index, f"shares too few points with the others{few}: it shows something else")


def _refuse_flat(job: Job) -> None:
    """Where one homography explains each pair, nothing has depth: cameras that turned, walls and posters alike."""
    pairs = zip(job.pairs, job.flat, job.inliers)
    if min(flat for pair, flat, count in pairs if count >= MIN_MATCHES and set(pair) <= set(job.kept)) > FLAT:
        raise Refusal(
            "the camera only turned, or everything in sight is flat or far away: no depth can be told from that; take "
            "the photographs from places a step apart, with things at several distances in them."
        )
