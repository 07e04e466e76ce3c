/* Search in pages that are opened as files.
 *
 * The theme searches in a Worker, which browsers do not start from file:. There, and only there,
 * this takes its place: a hidden frame in which the worker's script runs. It does what that script
 * needs (messages both ways) and no more. The theme's own plugin would load such a script from a
 * server; it does not where one of this name is given (`extra.polyfills` in mkdocs.yml).
 */
if (location.protocol === "file:") {
  window.Worker = class IFrameWorker extends EventTarget {
    constructor(url) {
      super();
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      document.body.append(this.frame);
      const inside = this.frame.contentWindow;
      // What the script sends: later, as a worker's messages are.
      inside.postMessage = (data) =>
        setTimeout(() => this.dispatchEvent(new MessageEvent("message", { data })));
      const script = inside.document.createElement("script");
      this.ready = new Promise((done, failed) => {
        script.onload = done;
        script.onerror = () => failed(new Error(`Expected a script, got none at ${url}.`));
      });
      script.src = url;
      inside.document.body.append(script);
    }

    postMessage(data) {
      const inside = this.frame.contentWindow;
      this.ready.then(() => inside.dispatchEvent(new MessageEvent("message", { data })));
    }

    terminate() {
      this.frame.remove();
    }
  };
}
