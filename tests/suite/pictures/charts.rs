//! Charts: what is drawn lies where it should, whatever the values; files that cannot be plotted are named.

use super::{read_png, refuses, succeeds};
use iddpm::config::{Schedule, TimestepSampler};
use iddpm::plot::charts::{self, Curves};
use iddpm::plot::table::{Table, smooth};
use iddpm::plot::{Axis, Chart, Figure, Look, Scale, Series};
use iddpm::schedule::Process;
use iddpm::timestep::{HISTORY, TimestepDist};

fn chart(points: Vec<(f64, f64)>, x: Scale, y: Scale) -> Chart {
    Chart {
        title: "a title".into(),
        x: Axis { label: "x".into(), scale: x },
        y: Axis { label: "y".into(), scale: y },
        series: vec![Series { name: "one".into(), points, ..Series::default() }],
        ..Chart::default()
    }
}

/// The points of every line of this colour.
fn lines(svg: &str, colour: &str) -> Vec<Vec<(f64, f64)>> {
    let of_colour = svg.lines().filter(|l| l.starts_with("<polyline") && l.contains(colour));
    let points = |line: &str| {
        let list = line.split('"').nth(1).unwrap();
        list.split(' ')
            .map(|p| p.split_once(',').map(|(x, y)| (x.parse().unwrap(), y.parse().unwrap())).unwrap())
            .collect()
    };
    of_colour.map(points).collect()
}

/// Blue, the first colour.
const FIRST: &str = "#0072b2";

/// Every tag is closed, every number is one, every line lies on the sheet.
fn check(figure: &Figure, what: &str) -> String {
    let svg = figure.svg();
    let mut open = Vec::new();
    for tag in svg.split('<').skip(1).map(|t| t.split('>').next().unwrap()) {
        match tag.strip_prefix('/') {
            Some(name) => assert_eq!(open.pop().as_deref(), Some(name), "{what}"),
            None if tag.ends_with('/') => {}
            None => open.push(tag.split(' ').next().unwrap().to_string()),
        }
    }
    assert!(open.is_empty(), "{what}: {open:?} stay open");
    assert!(!svg.contains("NaN") && !svg.contains("inf"), "{what}");
    let size = (figure.columns.clamp(1, figure.panels.len().max(1)) as f64 * 460.0, 320.0 * figure.panels.len() as f64);
    let inside = |p: &(f64, f64)| (0.0..=size.0).contains(&p.0) && (0.0..=size.1.max(320.0)).contains(&p.1);
    assert!(lines(&svg, "#").iter().flatten().all(inside), "{what}");
    svg
}

#[test]
fn points_lie_where_the_axes_say() {
    let svg =
        check(&Figure::new(vec![chart(vec![(0.0, 0.0), (5.0, 2.0), (10.0, 4.0)], Scale::Linear, Scale::Linear)]), "");
    let line = lines(&svg, FIRST).remove(0);
    // On a line through three points of equal distance the middle one is the middle.
    let middle = ((line[0].0 + line[2].0) / 2.0, (line[0].1 + line[2].1) / 2.0);
    // Coordinates are written with two decimals.
    assert!((line[1].0 - middle.0).abs() <= 0.01 && (line[1].1 - middle.1).abs() <= 0.01, "{line:?}");
    assert!(line[0].0 < line[2].0 && line[0].1 > line[2].1, "right and up: {line:?}");
    let svg =
        check(&Figure::new(vec![chart(vec![(1.0, 1e-3), (10.0, 1.0), (100.0, 1e3)], Scale::Log, Scale::Log)]), "");
    let line = lines(&svg, FIRST).remove(0);
    assert!((line[1].0 - (line[0].0 + line[2].0) / 2.0).abs() <= 0.01, "{line:?}");
    assert!((line[1].1 - (line[0].1 + line[2].1) / 2.0).abs() <= 0.01, "{line:?}");
}

#[test]
fn odd_values_leave_gaps_and_never_a_broken_file() {
    let (nan, inf) = (f64::NAN, f64::INFINITY);
    let odd: [(&str, Vec<(f64, f64)>); 9] = [
        ("nothing", vec![]),
        ("one point", vec![(3.0, 4.0)]),
        ("zero", vec![(0.0, 0.0)]),
        ("one value", vec![(1.0, 5.0), (2.0, 5.0)]),
        ("only NaN", vec![(nan, nan), (1.0, nan)]),
        ("NaN between", vec![(0.0, 1.0), (1.0, 2.0), (2.0, nan), (3.0, 1.0), (4.0, inf), (5.0, 2.0), (6.0, 3.0)]),
        ("negative", vec![(-3.0, -1.0), (-2.0, -7.0)]),
        ("huge", vec![(-1e300, -1e308), (1e300, 1e300), (0.0, 1e-300), (1.0, f64::MAX)]),
        ("close", vec![(1e15, 1.0), (1e15 + 1.0, 1.0 + 1e-15)]),
    ];
    for (what, points) in odd {
        for (x, y) in [(Scale::Linear, Scale::Linear), (Scale::Linear, Scale::Log), (Scale::Log, Scale::Log)] {
            let figure = Figure::new(vec![chart(points.clone(), x, y)]);
            let what = format!("{what}, {x:?} {y:?}");
            let svg = check(&figure, &what);
            let (h, w, pixels) = figure.pixels();
            assert_eq!((h, w, pixels.len()), (640, 920, 640 * 920 * 3), "{what}");
            match what.as_str() {
                "nothing, Linear Linear" | "only NaN, Linear Linear" => assert!(svg.contains("no values to show")),
                "one point, Linear Linear" => assert!(svg.contains("<circle")),
                "NaN between, Linear Linear" => {
                    assert_eq!(lines(&svg, FIRST).iter().map(Vec::len).collect::<Vec<_>>(), [2, 2]);
                    assert_eq!(svg.matches("<circle").count(), 1, "the point between two gaps");
                }
                _ => {}
            }
        }
    }
    check(&Figure::default(), "no panel");
}

#[test]
fn names_are_escaped() {
    let mut c = chart(vec![(0.0, 1.0), (1.0, 2.0)], Scale::Linear, Scale::Linear);
    c.title = "a<b & \"c\"\u{7}".into();
    c.series.push(Series { name: "</svg>".into(), colour: 1, ..c.series[0].clone() });
    let svg = check(&Figure::new(vec![c]), "markup in names");
    assert!(svg.contains("a&lt;b &amp; &quot;c&quot;?") && svg.contains("&lt;/svg&gt;"));
}

#[test]
fn pixels_show_what_the_svg_shows() {
    let figure = Figure::new(vec![chart(vec![(0.0, 1.0), (1.0, 3.0)], Scale::Linear, Scale::Linear)]);
    let line = lines(&figure.svg(), FIRST).remove(0);
    let (_, w, pixels) = figure.pixels();
    let at = |x: f64, y: f64| {
        let i = ((2.0 * y) as usize * w + (2.0 * x) as usize) * 3;
        [pixels[i], pixels[i + 1], pixels[i + 2]]
    };
    let middle = ((line[0].0 + line[1].0) / 2.0, (line[0].1 + line[1].1) / 2.0);
    assert_eq!(at(middle.0, middle.1), [0, 114, 178]);
    assert_eq!(at(1.0, 1.0), [255; 3]);
    let dark = pixels.chunks_exact(3).filter(|p| p.iter().all(|x| *x < 100)).count();
    assert!(dark > 500, "axes and words: {dark} dark pixels");
}

#[test]
fn areas_and_dashes_are_drawn() {
    let mut c = chart(vec![(0.0, 1.0), (1.0, 1.0), (1.0, 3.0), (0.0, 3.0)], Scale::Linear, Scale::Linear);
    c.series[0].look = Look::Area;
    c.series.push(Series { points: vec![(0.0, 2.0), (1.0, 2.0)], colour: 1, look: Look::Dashed, ..Series::default() });
    let figure = Figure::new(vec![c]);
    let svg = check(&figure, "");
    assert!(svg.contains("<polygon") && svg.contains("stroke-dasharray"));
    let (_, w, pixels) = figure.pixels();
    let y = lines(&svg, "#d55e00").remove(0)[0].1;
    let row = &pixels[(2.0 * y) as usize * w * 3..][..w * 3];
    let orange = |p: &[u8]| p[0] > 200 && p[2] < 60;
    let on = row.chunks_exact(3).filter(|p| orange(p)).count();
    let changes = row.chunks_exact(3).collect::<Vec<_>>().windows(2).filter(|p| orange(p[0]) != orange(p[1])).count();
    assert!(on > 300 && changes > 80, "{on} pixels of the line, {changes} changes");
    // A fifth of blue over white.
    assert!(pixels.chunks_exact(3).filter(|p| *p == [204, 227, 240]).count() > 10_000);
}

#[test]
fn schedules_are_the_tables_of_the_process() {
    let p = Process::new(Schedule::Cosine, 100).unwrap();
    let figure = charts::schedules(&[("cosine".into(), p.clone())]);
    assert_eq!(figure.iter().map(|c| c.key).collect::<Vec<_>>(), ["alpha-bar", "beta", "variances", "ratio"]);
    let at = |panel: usize, series: usize, i: usize| figure[panel].series[series].points[i];
    assert_eq!((at(0, 0, 0), at(0, 0, 99)), ((0.01, p.alpha_bar[0]), (1.0, p.alpha_bar[99])));
    assert_eq!(at(1, 0, 49).1, p.beta[49]);
    let area = &figure[2].series[0].points;
    assert_eq!((area.len(), area[0], area[199]), (200, at(2, 1, 0), at(2, 2, 0)));
    assert!((at(2, 2, 7).1 / p.beta_tilde[7] - 1.0).abs() < 1e-12, "exp(ln x) is x to a few ulp");
    assert_eq!((at(3, 0, 0).1, at(3, 0, 60).1), (0.0, p.beta_tilde[60] / p.beta[60]));
    let respaced = charts::schedules(&[("10".into(), p.respace(&[0, 49, 99]).unwrap())]);
    assert_eq!(respaced[0].series[0].points.iter().map(|p| p.0).collect::<Vec<_>>(), [0.01, 0.5, 1.0]);
}

#[test]
fn the_loss_history_is_shown_by_timestep() {
    let mut dist = TimestepDist::new(TimestepSampler::LossSecondMoment, 3);
    dist.update(&[0, 0, 2], &[3.0, 4.0, 0.5]);
    let cold = charts::loss_history(dist.history().unwrap());
    let y = |c: &Chart| c.series[0].points.iter().map(|p| p.1).collect::<Vec<_>>();
    assert_eq!((y(&cold[0])[0], y(&cold[0])[2]), (12.5f64.sqrt(), 0.5));
    assert!(y(&cold[0])[1].is_nan(), "t = 1 has no loss yet");
    assert_eq!(y(&cold[1]), [1.0; 3]);
    for t in 0..3 {
        dist.update(&[t; HISTORY], &[1.0 + t as f32; HISTORY]);
    }
    let warm = charts::loss_history(dist.history().unwrap());
    assert_eq!(y(&warm[0]), [1.0, 2.0, 3.0]);
    // p_t·T = 3·(0.999·w_t/6) + 0.001, to the rounding of a handful of operations.
    let want = [1.0, 2.0, 3.0].map(|w| 3.0 * 0.999 * w / 6.0 + 0.001);
    assert!(y(&warm[1]).iter().zip(want).all(|(p, want)| (p - want).abs() < 1e-14), "{:?}", y(&warm[1]));
}

#[test]
fn curves_are_smoothed_without_a_bias_at_the_start() {
    let points = [(0.0, 4.0), (1.0, f64::NAN), (2.0, 2.0), (3.0, 0.0)];
    let s = smooth(&points, 0.5);
    assert_eq!((s[0].1, s[2].1), (4.0, (0.5 * 4.0 + 2.0) / 1.5));
    assert!(s[1].1.is_nan());
    assert_eq!(smooth(&[(0.0, 7.0); 5], 0.9).iter().map(|p| p.1.round()).collect::<Vec<_>>(), [7.0; 5]);
    assert_eq!(smooth(&points[2..], 0.0), points[2..]);
    let mut log = Table::new("run");
    for step in 1..=200 {
        let loss = if step % 2 == 0 { 1.0 } else { 3.0 };
        log.push([("step", f64::from(step)), ("loss", loss), ("lr", 1e-4), ("loss_q1", loss)].into_iter());
    }
    let curves = |smooth| Curves { smooth, by_images: false, linear: false };
    let loss = &curves(None).training(std::slice::from_ref(&log))[0].series;
    assert_eq!(loss.iter().map(|s| s.look).collect::<Vec<_>>(), [Look::Solid, Look::Faint]);
    let (_, last) = loss[0].points[199];
    assert!((1.5..2.5).contains(&last), "between the two values: {last}");
    assert_eq!(curves(Some(0.0)).training(std::slice::from_ref(&log))[0].series.len(), 1);
    assert_eq!(curves(None).training(std::slice::from_ref(&log))[4].series.len(), 1, "the learning rate has no noise");
    let quarters = curves(Some(0.0)).quarters(&log);
    assert_eq!((quarters[0].series.len(), quarters[0].series[0].colour), (1, 1), "only the second quarter has losses");
}

#[test]
fn logs_and_tables_are_read_and_mistakes_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("log.jsonl");
    let read = |text: &str| {
        std::fs::write(&path, text).unwrap();
        Table::json_lines(&path, "run")
    };
    let log = read("{\"step\":1,\"loss\":2.5}\n{\"step\":2,\"loss\":null,\"mse\":1}\n{\"step\":3,\"lo").unwrap();
    assert_eq!(log.points("step", "loss"), [(1.0, 2.5)]);
    assert_eq!(log.points("step", "mse"), [(2.0, 1.0)]);
    assert_eq!((log.points("step", "vb"), log.column("step").unwrap().len()), (vec![], 2));
    let message = |r: iddpm::error::Result<Table>| r.unwrap_err().to_string();
    assert!(message(read("{\"step\":1}\nnonsense\n{\"step\":2}")).contains("log.jsonl: line 2"));
    assert!(message(read("")).contains("no rows"));
    std::fs::write(&path, b"\xff\xfe").unwrap();
    assert!(message(Table::json_lines(&path, "run")).contains("not text"));
    let csv = |text: &str| {
        std::fs::write(&path, text).unwrap();
        Table::csv(&path, "run")
    };
    assert_eq!(csv("t,vb_bpd\n0,1.5\n1,NaN\n2, 2\n\n").unwrap().points("t", "vb_bpd"), [(0.0, 1.5), (2.0, 2.0)]);
    assert!(message(csv("t,vb_bpd\n0,1\n1\n")).contains("line 3: 1 fields"));
    assert!(message(csv("t,vb_bpd\n0,x\n")).contains("line 2: \"x\""));
    assert!(message(csv("t,vb_bpd\n")).contains("no rows"));
    assert_eq!(Table::csv(&folder.path().join("none"), "run").unwrap_err().exit_code(), 2);
}

#[test]
fn the_command_writes_what_is_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    succeeds(folder.path(), &["plot", "schedule"]);
    assert!(std::fs::read_to_string(at("plots/schedule.svg")).unwrap().contains(">cosine</text>"));
    let ratio =
        "plot schedule --noise-schedule cosine --diffusion-steps 100,1000 --panels ratio --out deep/er/ratio.png";
    succeeds(folder.path(), &ratio.split(' ').collect::<Vec<_>>());
    let (h, w, c, _) = read_png(&at("deep/er/ratio.png"));
    assert_eq!((h, w, c), (640, 920, 3));
    std::fs::create_dir_all(at("a/nll")).unwrap();
    std::fs::write(at("a/nll/nll.csv"), "t,vb_bpd,x_0_mse,eps_mse\n0,1.5,0.1,0.9\n1,0.5,0.2,0.8\n").unwrap();
    std::fs::write(at("b.csv"), "t,vb_bpd\n0,1\n1,2\n").unwrap();
    succeeds(folder.path(), &["plot", "nll", "a", "b.csv", "--panels", "sum,terms", "--format", "png", "--out", "p"]);
    assert_eq!(read_png(&at("p/nll.png")).1, 1840);
    succeeds(folder.path(), &["plot", "nll", "a"]);
    assert!(at("a/plots/nll.svg").exists());
    refuses(folder.path(), &["plot", "log", "nowhere"], &["nowhere", "no such log"]);
    refuses(folder.path(), &["plot", "log", "a"], &["log.jsonl", "no such log"]);
    refuses(folder.path(), &["plot", "log", "b.csv"], &["b.csv", "line 1"]);
    refuses(folder.path(), &["plot", "nll", "deep"], &["deep", "iddpm nll"]);
    refuses(folder.path(), &["plot", "schedule", "--panels", "gamma"], &["gamma", "alpha-bar"]);
    refuses(folder.path(), &["plot", "schedule", "--diffusion-steps", "10"], &["diffusion_steps = 10", "cosine"]);
    refuses(folder.path(), &["plot", "log", "a", "--smooth", "1.5"], &["--smooth 1.5"]);
}
