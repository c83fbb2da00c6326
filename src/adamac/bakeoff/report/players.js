// The videos of a case run in step: the first one leads, the others follow its clock.
"use strict";
const cases = [...document.querySelectorAll(".case")].map((article) => {
  const videos = [...article.querySelectorAll("video")];
  const button = article.querySelector(".play");
  const seek = article.querySelector(".seek");
  const lead = videos[0];
  const all = () => [...article.querySelectorAll("video")];
  const align = (seconds) => all().forEach((video) => { video.currentTime = seconds; });

  function pause() {
    all().forEach((video) => video.pause());
    if (lead) align(lead.currentTime); // to the frame: a difference must not come from the clocks
    button.textContent = "Play";
  }
  function play() {
    if (!lead) return;
    if (lead.ended) align(0);
    all().forEach((video) => { video.currentTime = lead.currentTime; video.play().catch(() => {}); });
    button.textContent = "Pause";
  }
  function showDifference(show) {
    const dense = article.querySelector('figure[data-arm="dense"] video');
    article.querySelectorAll(".over").forEach((video) => video.remove());
    for (const video of videos) {
      const stage = video.parentElement;
      stage.classList.toggle("differs", show && video !== dense);
      if (!show || !dense || video === dense) continue;
      const over = dense.cloneNode();
      over.className = "over";
      over.muted = true;
      over.playbackRate = lead.playbackRate;
      stage.append(over);
      over.addEventListener("loadeddata", () => {
        align(lead.currentTime);
        if (!lead.paused) over.play().catch(() => {});
      }, { once: true });
    }
  }

  if (lead) {
    lead.addEventListener("timeupdate", () => {
      seek.value = lead.duration ? lead.currentTime / lead.duration : 0;
      for (const video of all()) {
        if (!lead.paused && Math.abs(video.currentTime - lead.currentTime) > 0.05) video.currentTime = lead.currentTime;
      }
    });
    lead.addEventListener("ended", () => { align(0); play(); });
  }
  videos.forEach((video) => video.addEventListener("click", () => (lead.paused ? play() : pause())));
  button.addEventListener("click", () => (lead && lead.paused ? play() : pause()));
  seek.addEventListener("input", () => { if (lead) { pause(); align(seek.value * lead.duration); } });
  article.querySelector(".slow").addEventListener("change", (event) => {
    all().forEach((video) => { video.playbackRate = event.target.checked ? 0.25 : 1; });
  });
  article.querySelector(".difference").addEventListener("change", (event) => showDifference(event.target.checked));
  return { play, pause };
});
document.getElementById("play-all").addEventListener("click", (event) => {
  const playing = event.target.textContent === "Pause all";
  cases.forEach((one) => (playing ? one.pause() : one.play()));
  event.target.textContent = playing ? "Play all" : "Pause all";
});
