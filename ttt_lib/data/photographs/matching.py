"""Features and verified matches of photographs; copies and those that show something else are left out."""

from __future__ import annotations

import numpy as np

from ttt_lib.data.photographs.features import USUAL_FOCAL, choose_pairs, shared_cameras, write_gray
from ttt_lib.data.photographs.job import MIN_MATCHES, Job, Refusal

FLAT = 0.88  # of the matches: rooms and streets, seen with little parallax, have up to 0.8; posters and turns 0.91 to 1
TWINS = 0.5  # of the larger features of a picture: from 0.94 where a pattern repeats, elsewhere 0.2 at most
MOVED = 0.0012  # of the longest side: what three quarters of the matches of a copy stay below


def match(job: Job, in_order: bool) -> None:
    """Features and verified matches in the database; copies and strangers are left out."""
    for index, picture in enumerate(job.pictures):
        job.grays.append(write_gray(picture.read(), job.folder / f"gray_{index}.npy"))
    first: dict[str, int] = {}
    for index, gray in enumerate(job.grays):
        if gray.digest in first:
            job.leave_out(index, f"is a copy of {job.pictures[first[gray.digest]].name}")
        first.setdefault(gray.digest, index)
    _enough_places(job)
    job.camera_of = shared_cameras(job.pictures, job.grays)
    cameras = [
        {"width": gray.width, "height": gray.height, "focal": (focal or USUAL_FOCAL) * gray.width, "known": known}
        for camera, (focal, known) in enumerate(zip(job.priors(), job.exact()))
        for gray in [job.grays[job.camera_of.index(camera)]]
    ]
    most = 4096 if len(job.pictures) <= 8 else 2048
    failed = job.run("features", cameras=cameras, camera_of=job.camera_of, most=most)
    if failed:
        raise Refusal(f"the photographs' features could not be computed ({failed}); send them to the authors.")
    with np.load(job.folder / "features.npz") as arrays:
        coarse, twins = arrays["coarse"], float(np.median(arrays["twins"][job.kept]))
    if twins > TWINS:
        raise Refusal(
            f"the photographs show one pattern again and again ({twins:.0%} of its details have a twin elsewhere in the "
            "same picture), so which is which cannot be told: take in things that are there only once."
        )
    kept = job.kept
    job.pairs = [(kept[i], kept[j]) for i, j in choose_pairs(coarse[kept], in_order)]
    failed = job.run("match", pairs=job.pairs, seed=job.seed)
    if failed:
        raise Refusal(f"the photographs could not be matched ({failed}); try fewer of them.")
    with np.load(job.folder / "matches.npz") as arrays:
        job.inliers, job.flat, job.moved = arrays["inliers"], arrays["flat"], arrays["moved"]
    for (i, j), count, distance in zip(job.pairs, job.inliers, job.moved):
        side = max(job.grays[j].width, job.grays[j].height)
        if i in job.kept and j in job.kept and count >= MIN_MATCHES and distance < MOVED * side:
            job.leave_out(j, f"is a copy of {job.pictures[i].name}, or taken from the same place")
    _enough_places(job)
    _leave_out_strangers(job)
    _refuse_flat(job)


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
    best = dict.fromkeys(job.kept, 0)
    group = {i: {i} for i in job.kept}
    for (i, j), count in zip(job.pairs, map(int, job.inliers)):
        if i not in best or j not in best:
            continue
        best[i], best[j] = max(best[i], count), max(best[j], count)
        if count >= MIN_MATCHES and group[i] is not group[j]:
            group[i] |= group[j]
            for member in group[j]:
                group[member] = group[i]
    largest = max(group.values(), key=lambda members: (len(members), sum(best[i] for i in members)))
    if len(largest) < 2:
        raise Refusal(
            f"the photographs share too few points ({max(best.values())} matches at most, {MIN_MATCHES} are needed): "
            "they must show the same things, with texture, and overlap by half or more."
        )
    for i in sorted(set(best) - largest):
        few = "shares too few points with the others" + (f" ({best[i]} matches at most)" if len(group[i]) == 1 else "")
        job.leave_out(i, f"{few}: it shows something else")


def _refuse_flat(job: Job) -> None:
    """Where one homography explains each pair, nothing has depth: cameras that turned, walls and posters alike."""
    flat = [
        share
        for (i, j), share, count in zip(job.pairs, job.flat, job.inliers)
        if count >= MIN_MATCHES and i in job.kept and j in job.kept
    ]
    if min(flat) > FLAT:
        raise Refusal(
            "the camera only turned, or everything in sight is flat or far away: no depth can be told from that; take "
            "the photographs from places a step apart, with things at several distances in them."
        )
