import { themeSwitch } from "./controls.js";

themeSwitch(null);
