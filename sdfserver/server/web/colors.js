// A colour map whose steps look even and stay told apart without colour vision: anchors of viridis, mixed between.

const ANCHORS = [
  [0.267, 0.005, 0.329], [0.283, 0.141, 0.458], [0.254, 0.265, 0.530], [0.207, 0.372, 0.553], [0.164, 0.471, 0.558],
  [0.128, 0.567, 0.551], [0.135, 0.659, 0.518], [0.267, 0.749, 0.441], [0.478, 0.821, 0.318], [0.741, 0.873, 0.150],
  [0.993, 0.906, 0.144],
];

/** Red, green and blue (0 to 1) of a share from 0 to 1. */
export function colorOf(share) {
  const at = Math.min(1, Math.max(0, share)) * (ANCHORS.length - 1);
  const low = Math.min(Math.floor(at), ANCHORS.length - 2), mix = at - low;
  return ANCHORS[low].map((value, i) => value + mix * (ANCHORS[low + 1][i] - value));
}

/** The whole map, as a CSS gradient from left to right. */
export const gradient = () =>
  `linear-gradient(to right, ${ANCHORS.map((color) => `rgb(${color.map((v) => Math.round(255 * v)).join(" ")})`).join(", ")})`;
