// Synthetic posts of this project. The images are train/demo's:
//   draw = lambda label, seed: Image.fromarray(
//       draw_picture(label, LOOKS["test"], numpy.random.default_rng(seed)).pixels)
// glad.png (positive, 5), plain.png (neutral, 10), sad.png (negative, 6), mixed.png (negative, 8);
// wide.png is (negative, 4) and (positive, 11) side by side. The sentences are from
// train/demo/sentences.py, split "test".

export const EXAMPLES = [
  { file: "glad.png", title: "Glad", alt: "a smiling face", text: "@emma @farid how beautiful the game is" },
  { file: "plain.png", title: "Plain", alt: "a plain face", text: "#summer: the average week of paris." },
  { file: "sad.png", title: "Sad", alt: "a sad face", text: "@david @anna how terrible the concert is." },
  { file: "mixed.png", title: "Mixed", alt: "a sad face, glad words", text: "All of us like that day in tokyo" },
  { file: "wide.png", title: "Wide", alt: "a sad and a smiling face side by side", text: "" },
];
