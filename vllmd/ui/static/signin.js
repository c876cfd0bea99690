// Signing in: by the link of `vllmctl ui`, whose code stands behind the # and so never reaches a log; or by a key.

import { html } from "./html.js";
import { useEffect, useState } from "./vendor/hooks.js";
import { signIn } from "./api.js";
import { Command, Problem } from "./parts.js";

export function SignIn() {
  const [key, setKey] = useState("");
  const [error, setError] = useState(null);
  const [busy, setBusy] = useState(false);
  const attempt = async (by) => {
    setBusy(true);
    try {
      await signIn(by);
    } catch (failure) {
      setError(failure);
      setBusy(false);
    }
  };
  useEffect(() => {
    const byLink = () => {
      const code = codeOf(location.hash);
      if (!code) return;
      history.replaceState(null, "", location.pathname); // it works once; no need to keep it in the history
      attempt({ code });
    };
    byLink();
    window.addEventListener("hashchange", byLink); // a link that is opened in this tab loads no page anew
    return () => window.removeEventListener("hashchange", byLink);
  }, []);
  const submit = (event) => {
    event.preventDefault();
    attempt({ key });
  };
  return html`<main id="main" class="sign-in" tabindex="-1"><h1>vllmd</h1>
    <${Problem} error=${error} />
    <h2>With a link</h2><p>On the machine that runs vllmd, as a member of the group <code>vllmd-admin</code>:</p><p><${Command} text="vllmctl ui" /></p>
    <h2>With an API key</h2><p>One with the scope <code>read</code> or <code>admin</code>.</p>
    <form onSubmit=${submit} class="filters"><input type="text" name="username" autocomplete="username" value="vllmd" hidden readonly /><label>Key <input type="password" name="key" autocomplete="current-password" required value=${key} onInput=${(event) => setKey(event.target.value)} /></label>
      <button type="submit" class="primary" disabled=${busy}>Sign in</button></form></main>`;
}

export const codeOf = (hash) => (/^#code=([\w-]+)$/.exec(hash) || [])[1] || "";
