// The microphone: a recording as a WAV file of 16 kHz, 16 bits and one channel.
//
// A browser's own recorder writes WEBM or OGG with Opus, which the server does not read. So the samples are collected
// here, resampled by the browser and written as WAV, which every model with ears can take.

const RATE = 16000;
const MOST_SECONDS = 600;  // the server's limit for a sound

/** Whether this browser lets this page ask for a microphone; on plain http it does so only for this machine. */
export const canRecord = () => Boolean(navigator.mediaDevices?.getUserMedia && window.AudioWorkletNode);

export class Recorder {
  /** `onTime(seconds)` is called while recording; `onEnd()` when the longest recording is reached. */
  static async start({ onTime, onEnd }) {
    const stream = await navigator.mediaDevices.getUserMedia({ audio: { channelCount: 1 } });
    const context = new AudioContext();
    try {
      await context.audioWorklet.addModule(new URL("recorder_worklet.js", import.meta.url));
      return new Recorder(stream, context, onTime, onEnd);
    } catch (error) {
      end(stream, context);
      throw error;
    }
  }

  constructor(stream, context, onTime, onEnd) {
    Object.assign(this, { stream, context });
    this.pieces = [];
    this.numSamples = 0;
    const node = new AudioWorkletNode(context, "recorder", { numberOfOutputs: 0, channelCount: 1, channelCountMode: "explicit" });
    node.port.onmessage = ({ data }) => {
      if (this.seconds >= MOST_SECONDS) return;
      this.pieces.push(data);
      this.numSamples += data.length;
      onTime(this.seconds);
      if (this.seconds >= MOST_SECONDS) onEnd();
    };
    context.createMediaStreamSource(stream).connect(node);
  }

  get seconds() {
    return this.numSamples / this.context.sampleRate;
  }

  /** End the recording; returns the file, or null if nothing was recorded. */
  async stop() {
    const { context, numSamples, seconds } = this;
    end(this.stream, context);
    if (!numSamples) return null;
    const buffer = new AudioBuffer({ length: numSamples, numberOfChannels: 1, sampleRate: context.sampleRate });
    let at = 0;
    for (const piece of this.pieces) {
      buffer.copyToChannel(piece, 0, at);
      at += piece.length;
    }
    const offline = new OfflineAudioContext(1, Math.ceil(seconds * RATE), RATE);
    const source = new AudioBufferSourceNode(offline, { buffer });
    source.connect(offline.destination);
    source.start();
    const rendered = await offline.startRendering();
    return new File([wav(rendered.getChannelData(0))], "recording.wav", { type: "audio/wav" });
  }
}

function end(stream, context) {
  for (const track of stream.getTracks()) track.stop();  // the browser's sign for recording goes out
  context.close();
}

/** A WAV file of samples from -1 to 1. */
export function wav(samples) {
  const view = new DataView(new ArrayBuffer(44 + 2 * samples.length));
  const text = (at, letters) => [...letters].forEach((letter, i) => view.setUint8(at + i, letter.charCodeAt(0)));
  const whole = (at, value) => view.setUint32(at, value, true);
  const half = (at, value) => view.setUint16(at, value, true);
  text(0, "RIFF"), whole(4, 36 + 2 * samples.length), text(8, "WAVEfmt "), whole(16, 16), half(20, 1), half(22, 1);
  whole(24, RATE), whole(28, 2 * RATE), half(32, 2), half(34, 16), text(36, "data"), whole(40, 2 * samples.length);
  samples.forEach((sample, i) => view.setInt16(44 + 2 * i, Math.round(32767 * Math.max(-1, Math.min(1, sample))), true));
  return view.buffer;
}
