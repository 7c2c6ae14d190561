// Follows a run that goes on: asks for the page again and puts its parts in place, so that nothing jumps.
"use strict";
const EVERY_MS = 2000;

async function follow() {
  const body = document.body;
  // Who selects text, types or has a part open is not disturbed.
  if (!document.hidden && getSelection().isCollapsed && !document.querySelector("details[open], form :focus")) {
    try {
      const answer = await fetch(location.href, { cache: "no-store" });
      if (answer.ok) {
        const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
        for (const part of ["header", "main", "footer"]) {
          const here = body.querySelector(`:scope > ${part}`), there = fresh.body.querySelector(`:scope > ${part}`);
          if (here && there && here.innerHTML !== there.innerHTML) here.replaceWith(document.adoptNode(there));
        }
        body.dataset.following = fresh.body.dataset.following;
        body.dataset.lost = "";
      }
    } catch {
      body.dataset.lost = "true";
    }
  }
  if (body.dataset.following) setTimeout(follow, EVERY_MS);
}

if (document.body.dataset.following) setTimeout(follow, EVERY_MS);
