"""
A Neural ODE learns a pendulum
==============================

A network is the right-hand side of an ordinary differential equation, and learns it from 25 observed trajectories of a
damped pendulum. The training is an ordinary PyTorch loop of thirty lines; whole trajectories and their gradients are
one call each, so that it takes seconds on one core.

For the pictures matplotlib is needed (the extra ``plot``).
"""

# %%
# The data
# --------
# Angle and angular velocity at 40 times, with a little noise. :func:`pykernels.data.damped_pendulum` simulates them;
# the constants are those of a published comparison.

import matplotlib.pyplot as plt
import numpy as np
import torch

from pykernels.data import damped_pendulum

data = damped_pendulum(seed=0)
print("training", data.train.shape, "test", data.test.shape)

figure, ax = plt.subplots(figsize=(7, 3), layout="constrained")
ax.plot(data.times, data.train[:5, :, 0].T, ".-", linewidth=0.8)
ax.set(xlabel="time", ylabel="angle", title="five of the training trajectories")

# %%
# The training
# ------------
# :class:`pykernels.nn.MLPField` is the network, and :func:`pykernels.odeint` integrates it from the first states: one
# step of Kutta's 3/8 rule, which torchdiffeq calls ``rk4`` too, from each observation to the next. For such a field all
# 39 steps with their 156 evaluations of the network run in one call, and so does their exact backward.

import pykernels

torch.manual_seed(0)
field = pykernels.nn.MLPField((2, 64, 64, 2), "silu")
optimizer = torch.optim.Adam(field.parameters(), lr=5e-3)
times = torch.tensor(data.times, dtype=torch.float32)
observed = torch.tensor(data.train, dtype=torch.float32).transpose(0, 1)  # (times, trajectories, 2)

losses = []
for _ in range(500):
    optimizer.zero_grad()
    predicted = pykernels.odeint(field, observed[0], times, method="rk4")
    loss = (predicted - observed).square().mean()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())

figure, ax = plt.subplots(figsize=(7, 3), layout="constrained")
ax.semilogy(losses)
ax.axhline(data.noise**2, color="black", linestyle=":", label="variance of the noise")
ax.set(xlabel="training step", ylabel="mean squared error")
ax.legend(frameon=False)

# %%
# Forecasts
# ---------
# Test trajectories begin elsewhere. The forecast knows nothing of them but the first state.

fresh = torch.tensor(data.test, dtype=torch.float32).transpose(0, 1)
with torch.no_grad():
    forecast = pykernels.odeint(field, fresh[0], times, method="rk4")
errors = (forecast - fresh).square().mean((0, 2))
print(f"mean squared error: {errors.mean():.4f}, of half of the trajectories below {errors.median():.4f}")
print(f"variance of the angles and velocities themselves: {fresh.var():.4f}")

figure, ax = plt.subplots(figsize=(7, 3), layout="constrained")
for i, color in enumerate(("C0", "C1", "C2")):
    ax.plot(data.times, fresh[:, i, 0], "o", color=color, markersize=3, label="observed" if i == 0 else None)
    ax.plot(data.times, forecast[:, i, 0], color=color, label="forecast" if i == 0 else None)
ax.set(xlabel="time", ylabel="angle", title="test trajectories")
ax.legend(frameon=False)

# %%
# The equation that it has learned
# --------------------------------
# Nobody told the network that angles change with the velocity and velocities with the sine of the angle. Where there
# were data its field is that of the pendulum, and elsewhere it makes something up.

angle = np.linspace(-np.pi, np.pi, 25)
velocity = np.linspace(-2.5, 2.5, 25)
states = np.stack(np.meshgrid(angle, velocity), -1)
with torch.no_grad():
    learned = field(0.0, torch.tensor(states, dtype=torch.float32)).numpy()
true = data.pendulum.derivative(states)

figure, axes = plt.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
for ax, values, title in ((axes[0], true, "the pendulum"), (axes[1], learned, "learned")):
    ax.streamplot(angle, velocity, values[..., 0], values[..., 1], density=1.1, linewidth=0.7, color="C0")
    ax.plot(*data.train.reshape(-1, 2).T, ".", color="C1", markersize=2)
    ax.set(xlabel="angle", title=title, xlim=(-np.pi, np.pi), ylim=(-2.5, 2.5))
axes[0].set_ylabel("angular velocity")

# %%
# As published
# ------------
# :class:`~pykernels.models.neural_ode.NeuralODE` is the network of the published comparison, with its first weights;
# :class:`~pykernels.models.neural_ode.NeuralODETraining` validates on the way, keeps the best weights and can be
# interrupted. Here are its first steps; ``pykernels reproduce neural-ode`` does all of them, in minutes.

from pykernels.models.neural_ode import NeuralODE, log_mse, train_neural_ode

model = NeuralODE(seed=0)
training = train_neural_ode(model, data.times, data.train, data.validation, n_steps=60, validate_every=20)
print("steps and validation errors:", [(step, f"{error:.2f}") for step, error in training.validations])
print(f"log MSE on the test set: {log_mse(model.predict(data.test[:, 0], data.times), data.test):.2f}")
