"""A robot arm in MuJoCo that should touch the red ball among other things, seen by a camera, with an expert.

It is made by `gymnasium.make("reach_env:ReachRedBall-v0", renderer="egl")`, in this process and in every worker of an
engine. Where the things are, and which one is the red ball, is only in the image.

Run as a script, this file renders once, with the renderer `MUJOCO_GL`.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import gymnasium
import mujoco
import numpy as np

EPISODE_STEPS = 20
SUBSTEPS = 10
"""Steps of the simulation, of 5 ms, in a step of the environment."""
TURN = 0.2
"""Angle in radians by which an action of 1 turns a joint."""
SIZE, RENDERED_SIZE = 48, 240
"""Pixels of an observed and of a rendered image in each direction."""

LINK = 0.25
"""Length of the upper arm, and that of the forearm."""
SHOULDER = 0.12
"""Height of the shoulder above the table."""
RADIUS, FINGERTIP = 0.04, 0.012
"""Radius of a ball, which is half the width of a cube, and that of the fingertip."""
APART = 0.12
"""Smallest distance between two things."""
RADII, ANGLES = (0.2, 0.42), (-0.9, 0.9)
"""Where things are, seen from the base of the arm."""
ELBOW_UP = np.array([0.0, -1.5, 2.0])
"""The angles of the joints around which an episode begins."""
THINGS = (("sphere", "0.9 0.1 0.1"), ("sphere", "0.1 0.7 0.2"), ("box", "0.1 0.3 0.9"), ("box", "0.9 0.8 0.1"))
"""Shapes and colors of the target, the red ball, and of the distractors: a green ball, a blue cube and a yellow one."""

_BODIES = "".join(
    f'<body mocap="true"><geom type="{shape}" size="{RADIUS} {RADIUS} {RADIUS}" rgba="{color} 1"/></body>'
    for shape, color in THINGS
)
MODEL = f"""
<mujoco>
  <option timestep="0.005" gravity="0 0 0" integrator="implicitfast"><flag contact="disable"/></option>
  <visual>
    <quality offsamples="0" shadowsize="0" numslices="12" numstacks="8"/>
    <headlight ambient="0.6 0.6 0.6" diffuse="0.5 0.5 0.5" specular="0 0 0"/>
  </visual>
  <default>
    <joint type="hinge" axis="0 1 0" damping="1" armature="0.1"/>
    <geom rgba="0.4 0.4 0.45 1"/>
    <position kp="200" kv="8"/>
  </default>
  <worldbody>
    <camera name="camera" pos="0.8 0 0.69" xyaxes="0 1 0 -0.766 0 0.643" fovy="44"/>
    <geom type="plane" size="2 2 0.1" rgba="0.8 0.8 0.75 1"/>
    <geom type="cylinder" size="0.05 0.05" pos="0 0 0.05" rgba="0.25 0.25 0.25 1"/>
    <body pos="0 0 {SHOULDER}">
      <joint name="base" axis="0 0 1"/>
      <geom type="sphere" size="0.04"/>
      <body>
        <joint name="shoulder"/>
        <geom type="capsule" size="0.02" fromto="0 0 0 {LINK} 0 0"/>
        <body pos="{LINK} 0 0">
          <joint name="elbow"/>
          <geom type="capsule" size="0.015" fromto="0 0 0 {LINK} 0 0"/>
          <site name="fingertip" pos="{LINK} 0 0"/>
          <geom type="sphere" size="{FINGERTIP}" pos="{LINK} 0 0" rgba="0.1 0.1 0.1 1"/>
        </body>
      </body>
    </body>
    {_BODIES}
  </worldbody>
  <actuator><position joint="base"/><position joint="shoulder"/><position joint="elbow"/></actuator>
</mujoco>
"""


@dataclass(frozen=True)
class Segment:
    actions: Iterator[np.ndarray]
    name: str
    instruction: str


class Camera:
    """Renders without a screen.

    `mujoco.Renderer` would use the renderer that this process had chosen when it imported MuJoCo.

    Args:
        model: what is rendered.
        renderer: the renderer of MuJoCo.
        size: pixels of the image in each direction.
        samples: samples of a pixel; 0 is the fastest, with stairs at the edges.
    """

    def __init__(self, model: mujoco.MjModel, renderer: str, size: int, samples: int) -> None:
        # Mesa would start a thread for each core, to wait for each other at images this small.
        os.environ.setdefault("LP_NUM_THREADS", "0")
        self._model = model
        model.vis.global_.offwidth = model.vis.global_.offheight = size
        model.vis.quality.offsamples = samples
        self._gl = importlib.import_module(f"mujoco.{renderer}").GLContext(size, size)
        self._gl.make_current()
        self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        self._scene = mujoco.MjvScene(model, maxgeom=100)
        self._scene.flags[:] = 0  # no shadows, reflections, haze and sky
        self._options = mujoco.MjvOption()
        self._camera = mujoco.MjvCamera()
        self._camera.type, self._camera.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED, 0
        self._area = mujoco.MjrRect(0, 0, size, size)
        self._upside_down = np.empty((size, size, 3), np.uint8)

    def look(self, data: mujoco.MjData) -> np.ndarray:
        """Return an image, uint8 `[size, size, 3]`."""
        self._gl.make_current()
        mujoco.mjv_updateScene(
            self._model, data, self._options, None, self._camera, mujoco.mjtCatBit.mjCAT_ALL, self._scene
        )
        mujoco.mjr_render(self._area, self._scene, self._context)
        mujoco.mjr_readPixels(self._upside_down, None, self._area, self._context)
        return self._upside_down[::-1].copy()

    def close(self) -> None:
        self._gl.make_current()
        self._context.free()
        self._gl.free()


class ReachRedBall(gymnasium.Env[dict[str, np.ndarray], np.ndarray]):
    """Touch the red ball with the fingertip.

    Args:
        renderer: the renderer of MuJoCo, "egl" or "osmesa".
        noise: standard deviation of the noise on each action. The robot executes the noisy action, but the
            demonstration records the action without noise. So it contains the expert's corrections.
        render_mode: "rgb_array": :meth:`render` returns a sharp image, and below it the one that is observed.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 20}
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (3,), np.float32)
    observation_space = gymnasium.spaces.Dict(
        pixels=gymnasium.spaces.Box(0, 255, (SIZE, SIZE, 3), np.uint8),
        joints=gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float32),
    )

    def __init__(self, renderer: str, noise: float = 0.0, render_mode: str | None = None) -> None:
        self.render_mode = render_mode
        self._noise = noise
        self._model = mujoco.MjModel.from_xml_string(MODEL)
        self._data = mujoco.MjData(self._model)
        self._camera = Camera(self._model, renderer, SIZE, samples=0)
        self._sharp = Camera(self._model, renderer, RENDERED_SIZE, samples=4) if render_mode else None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        super().reset(seed=seed)
        mujoco.mj_resetData(self._model, self._data)
        self._data.qpos[:] = self._data.ctrl[:] = ELBOW_UP + self.np_random.uniform(-0.4, 0.4, 3)
        self._data.mocap_pos[:] = self._places()
        self._goal = _angles(self._data.mocap_pos[0])
        mujoco.mj_forward(self._model, self._data)
        return self._observation(), {}

    def _places(self) -> np.ndarray:
        """Return random positions on the table, `[things, 3]`, the target's first."""
        places: list[np.ndarray] = []
        while len(places) < len(THINGS):
            radius, angle = self.np_random.uniform(*RADII), self.np_random.uniform(*ANGLES)
            place = np.array([radius * np.cos(angle), radius * np.sin(angle), RADIUS])
            if all(np.linalg.norm(place - other) > APART for other in places):
                places.append(place)
        return np.stack(places)

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        noisy = action + self._noise * self.np_random.standard_normal(3) if self._noise else action
        self._data.ctrl[:] = self._data.qpos + TURN * np.clip(noisy, -1.0, 1.0)
        mujoco.mj_step(self._model, self._data, SUBSTEPS)
        mujoco.mj_forward(self._model, self._data)
        distances = np.linalg.norm(self._data.mocap_pos - self._data.site("fingertip").xpos, axis=1)
        touched = distances < RADIUS + FINGERTIP
        return self._observation(), -float(distances[0]), False, False, {"is_success": bool(touched[0])}

    def _observation(self) -> dict[str, np.ndarray]:
        return {"pixels": self._camera.look(self._data), "joints": self._data.qpos.astype(np.float32)}

    def render(self) -> np.ndarray | None:
        if self._sharp is None:
            return None
        enlarged = np.kron(self._camera.look(self._data), np.ones((RENDERED_SIZE // SIZE,) * 2 + (1,), np.uint8))
        return np.concatenate([self._sharp.look(self._data), enlarged])

    def create_demo_segments(self) -> Iterator[Segment]:
        """Plan each action when it is requested, from the state that the previous actions have reached."""
        yield Segment(self._reach(), "reach", "Touch the red ball.")

    def _reach(self) -> Iterator[np.ndarray]:
        for _ in range(EPISODE_STEPS):
            yield ((self._goal - self._data.qpos) / TURN).clip(-1.0, 1.0).astype(np.float32)

    def close(self) -> None:
        self._camera.close()
        if self._sharp is not None:
            self._sharp.close()


def _angles(place: np.ndarray) -> np.ndarray:
    """Return the angles of the joints, with the elbow above, at which the fingertip is at `place` `[3]`."""
    forward, up = np.hypot(place[0], place[1]), place[2] - SHOULDER
    distance = np.hypot(forward, up)
    bend = np.arccos(distance / (2 * LINK))  # of both links, from the line between the shoulder and the place
    return np.array([np.arctan2(place[1], place[0]), -np.arctan2(up, forward) - bend, 2 * bend])


gymnasium.register("ReachRedBall-v0", entry_point=ReachRedBall, max_episode_steps=EPISODE_STEPS)

if __name__ == "__main__":
    ReachRedBall(os.environ["MUJOCO_GL"]).reset()
