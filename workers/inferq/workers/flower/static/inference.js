/* The page Inference: asks for its figures every two seconds while somebody looks.
   What comes from Redis is only ever set as text, never as markup. */
(function () {
  "use strict";

  var EVERY_MS = 2000;
  var PATIENCE_MS = 8000;
  // A worker writes every 2 s; an older reading is said to be old.
  var STALE_S = 6;
  var PARTS = [
    ["queue", "Queue"],
    ["input", "Compute input"],
    ["infer", "Compute"],
    ["output", "Compute output"],
    ["settle", "Settle"],
  ];

  var page = document.getElementById("inference");
  var timer = null;
  var asking = false;
  var lastAt = null;
  // Seconds; workers do not tell longer times apart.
  var longest = Infinity;

  function el(tag, className) {
    var made = document.createElement(tag);
    if (className) {
      made.className = className;
    }
    for (var n = 2; n < arguments.length; n += 1) {
      if (arguments[n] !== null && arguments[n] !== undefined) {
        made.append(arguments[n]);
      }
    }
    return made;
  }

  function svg(tag, attributes) {
    var made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    Object.keys(attributes).forEach(function (name) {
      made.setAttribute(name, attributes[name]);
    });
    return made;
  }

  /* Figures as people read them. */

  function count(value) {
    return value.toLocaleString("en-US", { maximumFractionDigits: 0 });
  }

  function rate(value) {
    var digits = value >= 100 ? 0 : value >= 1 ? 1 : 2;
    return value.toLocaleString("en-US", { maximumFractionDigits: digits });
  }

  function seconds(value) {
    if (value < 0.001) {
      return (value * 1e6).toLocaleString("en-US", { maximumSignificantDigits: 3 }) + " µs";
    }
    if (value < 1) {
      return (value * 1000).toLocaleString("en-US", { maximumSignificantDigits: 3 }) + " ms";
    }
    if (value < 120) {
      return value.toLocaleString("en-US", { maximumSignificantDigits: 3 }) + " s";
    }
    return duration(value);
  }

  function latency(value) {
    return value === null ? null : (value >= longest ? "over " : "") + seconds(value);
  }

  function duration(value) {
    var units = [["d", 86400], ["h", 3600], ["min", 60]];
    for (var n = 0; n < units.length; n += 1) {
      if (value >= 2 * units[n][1]) {
        return Math.floor(value / units[n][1]) + " " + units[n][0];
      }
    }
    return Math.round(value) + " s";
  }

  function percent(part) {
    return part > 0 && part < 0.01 ? "<1 %" : Math.round(part * 100) + " %";
  }

  function bytes(value) {
    return (value / 1073741824).toLocaleString("en-US", { maximumFractionDigits: 1 });
  }

  function fact(name, field, value, small, className) {
    var shown = value === null || value === undefined ? "—" : value;
    var data = el("dd", className, shown, small ? el("small", "", small) : null);
    data.dataset.field = field;
    return el("div", "", el("dt", "", name), data);
  }

  /* One model. */

  function header(model) {
    var tags = [];
    if (model.engines.length) {
      tags.push(model.engines.join(", "));
      tags.push("version " + model.versions.join(", "));
    }
    var made = el(
      "header", "inference-card-header",
      el("h2", "inference-name", model.model),
      el("span", "inference-tag", tags.join(" · "))
    );
    if (model.depth > 0 && model.consumers === 0) {
      made.append(el("span", "inference-alert inference-alert-danger", "no worker serves it"));
    }
    if (model.limit !== null && model.depth >= model.limit) {
      made.append(el("span", "inference-alert inference-alert-danger", "queue is full"));
    } else if (model.near_limit) {
      made.append(el("span", "inference-alert", "queue is nearly full"));
    }
    if (model.mismatch !== null) {
      var wrong = el(
        "span", "inference-alert inference-alert-danger",
        model.unbatched ? "runs request by request" : "wrong answers in batches"
      );
      wrong.dataset.alert = "mismatch";
      wrong.title = model.mismatch;
      made.append(wrong);
    }
    if (model.rates && model.rates.failures_per_s > 0) {
      made.append(el(
        "span", "inference-alert inference-alert-danger",
        rate(model.rates.failures_per_s) + " failures/s"
      ));
    }
    return made;
  }

  function priorities(model) {
    var steps = Object.keys(model.by_priority).filter(function (step) {
      return model.by_priority[step] > 0;
    });
    if (!steps.length || (steps.length === 1 && steps[0] === "0")) {
      return null;
    }
    return steps.map(function (step) {
      return "p" + step + ": " + count(model.by_priority[step]);
    }).join(", ");
  }

  function waiting(model) {
    var small = priorities(model);
    var made = fact("Waiting", "depth", count(model.depth), small);
    if (model.limit !== null) {
      var part = Math.min(1, model.depth / model.limit);
      var fill = el("i");
      fill.style.width = part * 100 + "%";
      made.append(el("div", "inference-meter" + (model.near_limit ? " inference-meter-near" : ""), fill));
      made.title = "at most " + count(model.limit) + " (max_queue_depth)";
    }
    return made;
  }

  function facts(model) {
    var rates = model.rates;
    return el(
      "dl", "inference-facts",
      waiting(model),
      fact("Requests/s", "rate", rates ? rate(rates.requests_per_s) : null),
      fact("p50", "p50", rates && latency(rates.p50_s)),
      fact("p95", "p95", rates && latency(rates.p95_s)),
      fact("Oldest", "oldest", model.oldest_age_s === null ? null : seconds(model.oldest_age_s)),
      fact("Claimed", "claimed", count(model.claimed)),
      fact("Later", "later", count(model.later)),
      fact(
        "Dead letters", "dead", count(model.dead), null, model.dead > 0 ? "inference-danger" : ""
      ),
      fact("Workers", "consumers", count(model.consumers)),
      fact(
        "Lanes busy", "lanes",
        model.lanes ? model.lanes_busy + " of " + model.lanes : null,
        rates && rates.busy !== null && model.lanes ? percent(rates.busy) + " of time" : null
      )
    );
  }

  function spark(name, points, read) {
    var highest = Math.max.apply(null, points);
    if (points.length < 3) {
      return null;
    }
    var width = 300;
    var height = 40;
    var line = points.map(function (value, n) {
      var x = (n / (points.length - 1)) * width;
      var y = height - 1 - (highest > 0 ? value / highest : 0) * (height - 4);
      return x.toFixed(1) + "," + y.toFixed(1);
    }).join(" ");
    var made = svg("svg", {
      class: "inference-spark", viewBox: "0 0 " + width + " " + height,
      preserveAspectRatio: "none", role: "img",
      "aria-label": name + " of the last minutes, at most " + read(highest),
    });
    made.append(svg("polygon", { points: "0," + height + " " + line + " " + width + "," + height }));
    made.append(svg("polyline", { points: line }));
    return el(
      "figure", "inference-course", made,
      el("figcaption", "", name, el("span", "", "highest " + read(highest)))
    );
  }

  function courses(model) {
    return el(
      "div", "inference-courses",
      spark("Requests/s", model.rate_points, rate), spark("Waiting", model.depth_points, count)
    );
  }

  function batches(model) {
    var made = el("div", "", el("p", "inference-label", "Batch sizes, in rows"));
    var rates = model.rates;
    if (!rates || !rates.batches.length) {
      made.append(el("p", "inference-quiet", quiet(model)));
      return made;
    }
    var total = rates.batches.reduce(function (sum, each) { return sum + each.count; }, 0);
    var highest = Math.max.apply(null, rates.batches.map(function (each) { return each.count; }));
    var bars = el("div", "inference-bars");
    bars.setAttribute("role", "img");
    rates.batches.forEach(function (each) {
      var size = each.high === null ? each.low + "+" :
        each.low === each.high ? String(each.low) : each.low + "–" + each.high;
      var column = el("i");
      column.style.height = (each.count / highest) * 70 + "%";
      var bar = el(
        "div", "inference-bar",
        el("span", "", each.count ? percent(each.count / total) : ""),
        column,
        el("span", "inference-bar-size", size)
      );
      bar.title = count(each.count) + " batches of " + size + " rows";
      bars.append(bar);
    });
    bars.setAttribute("aria-label", "Batches by their number of rows");
    made.append(bars);
    var says = "mean " + rate(rates.mean_batch || 0) + ", aims at " + model.target_batch_size +
      ", at most " + model.max_batch_size + " · " + rate(rates.batches_per_s) + " batches/s";
    if (rates.padding) {
      says += " · " + percent(rates.padding) + " padding";
    }
    made.append(el("p", "inference-quiet mt-2", says));
    return made;
  }

  function split(model) {
    var made = el("div", "", el("p", "inference-label", "Where a request's time goes"));
    var parts = model.rates ? model.rates.split_s : {};
    var total = PARTS.reduce(function (sum, part) { return sum + (parts[part[0]] || 0); }, 0);
    if (!(total > 0)) {
      made.append(el("p", "inference-quiet", quiet(model)));
      return made;
    }
    var stack = el("div", "inference-stack");
    var legend = el("div", "inference-legend");
    PARTS.forEach(function (part) {
      var mean = parts[part[0]] || 0;
      var piece = el("i", "part-" + part[0]);
      piece.style.width = (mean / total) * 100 + "%";
      piece.title = part[1] + ": " + seconds(mean);
      if (mean / total > 0.002) {
        stack.append(piece);
      }
      var figure = el("span", "", seconds(mean));
      figure.dataset.part = part[0];
      legend.append(
        el("i", "part-" + part[0]), el("span", "", part[1]), figure,
        el("span", "", percent(mean / total))
      );
    });
    stack.setAttribute("role", "img");
    stack.setAttribute("aria-label", "Shares of a request's time; the list says them, too");
    made.append(stack, legend);
    return made;
  }

  function quiet(model) {
    if (!model.consumers && !model.lanes) {
      return "No worker serves this model.";
    }
    return model.rates ? "Nothing was computed in the last seconds." : "Measuring…";
  }

  function mismatch(model) {
    return model.mismatch === null ? null : el(
      "p", "inference-quiet",
      model.mismatch + ". Write batchable = false into its model.toml."
    );
  }

  function modelCard(model) {
    var left = el("div", "", mismatch(model), facts(model), courses(model));
    var card = el(
      "article", "inference-card", header(model),
      el("div", "inference-body", left, batches(model), split(model))
    );
    card.dataset.model = model.model;
    return card;
  }

  /* One worker. */

  function workerCard(worker) {
    var gpu = worker.gpu || {};
    var memory = gpu.memory_used_bytes !== undefined && gpu.memory_total_bytes !== undefined ?
      bytes(gpu.memory_used_bytes) + " of " + bytes(gpu.memory_total_bytes) + " GiB" : null;
    var head = el(
      "header", "inference-card-header",
      el("h3", "inference-name", worker.node),
      el("span", "inference-tag", "pid " + worker.pid)
    );
    if (!worker.redis_up) {
      head.append(el("span", "inference-alert inference-alert-danger", "Redis does not answer it"));
    }
    if (worker.silent_s > STALE_S) {
      head.append(el("span", "inference-alert", "silent for " + duration(worker.silent_s)));
    }
    var list = el(
      "dl", "inference-facts",
      fact("State", "state", worker.state),
      fact("Device", "device", worker.device),
      fact("Lanes busy", "lanes", worker.lanes_busy + " of " + worker.lanes),
      fact("Up", "up", duration(worker.up_s))
    );
    if (worker.gpu) {
      list.append(fact("GPU memory", "gpu-memory", memory));
      if (gpu.utilisation_percent !== undefined) {
        list.append(fact("GPU busy", "gpu-busy", Math.round(gpu.utilisation_percent) + " %"));
      }
    }
    var served = fact("Models", "models", worker.models.join(", "));
    served.className = "inference-wide";
    list.append(served);
    var card = el("article", "inference-card", head, list);
    card.dataset.worker = worker.node;
    card.title = Object.keys(worker.versions).map(function (name) {
      return name + " " + worker.versions[name];
    }).join(", ");
    return card;
  }

  /* One model that workers were to serve and do not, or a version of it. */

  function missingCard(missing) {
    var card = el(
      "article", "inference-card inference-missing",
      el(
        "header", "inference-card-header",
        el("h3", "inference-name", missing.model),
        missing.version === null ? null : el("span", "inference-tag", "version " + missing.version),
        missing.version === null ?
          el("span", "inference-alert inference-alert-danger", "not served") :
          el("span", "inference-alert", "passed over: an older version is served"),
        el("span", "inference-tag", missing.nodes.join(", "))
      ),
      el("p", "inference-reason", missing.reason)
    );
    card.dataset.missing = missing.model;
    return card;
  }

  function empty() {
    return el(
      "div", "inference-card inference-empty",
      "No model has been announced yet, and nothing waits. Start a worker with ",
      el("code", "", "inferq worker --models DIR"), "."
    );
  }

  /* The page. */

  function total(name, value) {
    page.querySelector('[data-total="' + name + '"]').textContent = value;
  }

  function sum(rows, pick) {
    return rows.reduce(function (all, row) { return all + pick(row); }, 0);
  }

  function show(told) {
    var models = told.models;
    longest = told.longest_s;
    var known = told.age_s !== null;
    var measured = models.some(function (model) { return model.rates; });
    total("rate", measured ? rate(sum(models, function (model) {
      return model.rates ? model.rates.requests_per_s : 0;
    })) : "—");
    ["depth", "claimed", "dead"].forEach(function (name) {
      total(name, known ? count(sum(models, function (model) { return model[name]; })) : "—");
    });
    var cards = models.map(modelCard);
    document.getElementById("inference-models").replaceChildren.apply(
      document.getElementById("inference-models"), cards.length || !known ? cards : [empty()]
    );
    var missing = document.getElementById("inference-missing");
    missing.replaceChildren.apply(missing, told.not_served.map(missingCard));
    document.getElementById("inference-missing-heading").hidden = !told.not_served.length;
    var workers = document.getElementById("inference-workers");
    workers.replaceChildren.apply(workers, told.workers.map(workerCard));
    document.getElementById("inference-workers-heading").hidden = !told.workers.length;
    var notes = document.getElementById("inference-notes");
    notes.replaceChildren.apply(notes, told.notes.map(function (note) {
      return el("p", "page-description", note);
    }));
  }

  function status(live, text, problem) {
    var dot = document.getElementById("inference-dot");
    dot.className = "status-dot " + (live ? "status-dot-live" : "status-dot-error");
    document.getElementById("inference-status").textContent = text;
    var box = document.getElementById("inference-problem");
    box.hidden = !problem;
    box.textContent = problem || "";
    page.classList.toggle("inference-stale", !live);
  }

  function judge(told) {
    var old = told.age_s === null ? null : duration(told.age_s);
    lastAt = told.age_s === null ? null : Date.now() - told.age_s * 1000;
    if (told.problem) {
      status(
        false, old === null ? "No figures" : "Figures of " + old + " ago",
        sentence(told.problem) + (old === null ? "" : " What stands here was read " + old + " ago.")
      );
    } else if (old !== null && told.age_s > STALE_S) {
      status(false, "Figures of " + old + " ago", null);
    } else {
      status(true, "Live, every 2 s", null);
    }
  }

  function sentence(text) {
    return text.replace(/\.?$/, ".");
  }

  function lost(problem) {
    var old = lastAt === null ? "" :
      " What stands here was read " + duration((Date.now() - lastAt) / 1000) + " ago.";
    status(false, "No answer", sentence(problem) + old);
  }

  async function ask() {
    if (asking) {
      return;
    }
    asking = true;
    var patience = new AbortController();
    var impatient = setTimeout(function () { patience.abort(); }, PATIENCE_MS);
    try {
      var reply = await fetch(page.dataset.url, {
        cache: "no-store", credentials: "same-origin", redirect: "error", signal: patience.signal,
      });
      if (reply.status === 401 || reply.status === 403) {
        lost("Flower asks for a login: load the page again");
      } else if (!reply.ok) {
        lost("Flower answered with status " + reply.status);
      } else {
        var told = await reply.json();
        show(told);
        judge(told);
      }
    } catch (problem) {
      lost("Flower does not answer");
    } finally {
      clearTimeout(impatient);
      asking = false;
    }
  }

  function look() {
    if (timer !== null) {
      clearInterval(timer);
      timer = null;
    }
    if (!document.hidden) {
      ask();
      timer = setInterval(ask, EVERY_MS);
    }
  }

  document.addEventListener("visibilitychange", look);
  look();
}());
